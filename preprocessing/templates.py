"""What the templates of the English Wikipedia say: a table of names and rules, and of names that stand for no words.

A rule is a pattern or a function. In a pattern, `{2/text=x}` is the value of the first of these parameters that has
one, or else `x`, and `<...>` is left out unless one of its parameters has a value. A function takes the parameters by
name; unnamed ones have the numbers from 1. None means that the template says something that is not known, such as an
age today or a converted quantity. Quantities are written as they were typed, without their conversion.
"""

import re
from collections.abc import Callable, Iterable

Arguments = dict[str, str]
Rule = str | Callable[[Arguments], str | None]

FIELD = re.compile(r"\{([^{}=]+)(?:=([^{}]*))?\}")
OPTIONAL = re.compile(r"<[^<>]*>")
PIECE = re.compile(r"<([^<>]*)>|\{[^{}]*\}")
POSITIONS = 500  # numbers of parameters above it are not positions in a list


def apply(rule: Rule, arguments: Arguments) -> str | None:
    """What a template says; None if that is not known, or if none of its parameters has a place in the rule."""
    if callable(rule):
        return rule(arguments)

    def value(field: re.Match[str]) -> str:
        return next((arguments[name] for name in field[1].split("/") if arguments.get(name)), field[2] or "")

    def piece(found: re.Match[str]) -> str:
        if found[1] is None:
            return value(FIELD.fullmatch(found[0]))
        return FIELD.sub(value, found[1]) if any(map(value, FIELD.finditer(found[1]))) else ""

    always = OPTIONAL.sub("", rule)
    if not any(map(value, FIELD.finditer(rule))) and (FIELD.search(always) or not always and rule):
        return None if any(arguments.values()) else ""
    text = PIECE.sub(piece, rule)
    return text.lstrip(",; ") if rule.startswith("<") else text


def positional(arguments: Arguments) -> list[str]:
    """The values of the parameters 1, 2, ...; empty where there is none."""
    numbers = [int(name) for name in arguments if name.isdecimal() and len(name) < 4 and 0 < int(name) < POSITIONS]
    return [arguments.get(str(number), "") for number in range(1, max(numbers, default=0) + 1)]


def is_set(value: str | None) -> bool:
    return (value or "").lower() not in ("", "n", "no", "0", "off")


def superscript(text: str) -> str:
    return f"^{text}" if re.fullmatch(r"[-−+\d]+", text) else text  # 10^3 is not 103


def joined(separator: str, before: str = "") -> Rule:
    def rule(arguments: Arguments) -> str:
        values = [*filter(None, (arguments.get("title"), *positional(arguments)))]
        return before + separator.join(values) if values else ""

    return rule


def in_brackets(first: str, *rest: str) -> Rule:
    """`first (rest, rest)` of the parameters of these names, or the first that there is before the others."""

    def rule(arguments: Arguments) -> str:
        said = [*filter(None, map(arguments.get, (first, *rest)))]
        return f"{said[0]} ({', '.join(said[1:])})" if len(said) > 1 else "".join(said)

    return rule


# Quantities

NUMBER = re.compile(r"[-−–+±~<>≈]?[\d.½¼¾⅓⅔⅛⅜⅝⅞][\d.,/+–−½¼¾⅓⅔⅛⅜⅝⅞-]*(?:[eE][-+−]?\d+)?")
RANGES = {
    **dict.fromkeys(("-", "–", "to(-)"), "–"),
    **dict.fromkeys(("x", "xx", "×", "*"), " × "),
    **dict.fromkeys(("+/-", "±", "+-", "-/+"), " ± "),
    **{word: f" {word} " for word in ("to", "and", "or", "by", "+", "&", "to about", "or about", "plus", "minus")},
    **{word: f"{word} " for word in (",", ", and", ", or", ";")},
    "and(-)": " and ",
    "or(-)": " or ",
    "/": "/",
}
UNITS = {
    **{code: f"°{code[0]}" for code in ("C", "F", "C-change", "F-change")},
    **{f"PD/{area}": f"inhabitants/{area}" for area in ("sqmi", "km2", "ha", "acre")},
    "LT": "long tons",
    "ST": "short tons",
}
UNIT_WORDS = re.compile(r"\b(sq|cu|US|us|imp)(?=(?:mi|ft|in|yd|gal|floz|fl oz|bbl|pt|qt)\b)")
WITHOUT_SPACE = ("%", "°", "′", "″", "'", '"', "‰")


def as_number(typed: str) -> str:
    """`2+1/2` is `2 1/2`, `3-5` is `3–5`, `1.5e6` is `1.5×10^6`."""
    typed = re.sub(r"(?<=\d)[+-](?=\d+/)", " ", typed).replace("//", "/")
    typed = re.sub(r"(?<=\d)-(?=\d)", "–", typed)
    return re.sub(r"[eE]\+?([-−]?)(?=\d+$)", r"×10^\1", typed)


def as_unit(code: str) -> str:
    """The symbol of a unit of `convert`: `sqmi` is `sq mi`, `e6m3` is `×10^6 m3`."""
    power = re.fullmatch(r"(?:e(\d+))?(.+)", code, re.DOTALL)
    return f"×10^{power[1]} " * bool(power[1]) + UNIT_WORDS.sub(r"\1 ", UNITS.get(power[2], power[2]))


def convert(arguments: Arguments) -> str | None:
    """`3|to|5|m|ft`: `3 to 5 m`, and `6|ft|4|in|cm|0`: `6 ft 4 in`. The rest is the conversion, and its precision."""
    values = positional(arguments)
    shown = arguments.get("disp", "")
    if shown in ("number", "output number only", "unit", "unit2", "unit or text") or not values:
        return None  # the number or unit alone, beside one that is typed, of what was converted
    place = arguments.get("adj") or shown
    words = values.pop() if place in ("mid", "pre", "preunit") and len(values) > 2 else ""
    said, last, before_unit = "", "", f" {words}" if words and place != "mid" else ""
    for value, following in zip(values, [*values[1:], ""], strict=True):
        is_number, number_follows = NUMBER.fullmatch(value), NUMBER.fullmatch(following)
        if value in RANGES and said and number_follows:
            said, last = said + RANGES[value], "range"
        elif is_number and last in ("", "range"):
            said, last = said + as_number(value), "number"
        elif is_number and last == "unit" and following and not number_follows:  # or else it is the precision
            said, last = f"{said} {as_number(value)}", "number"
        elif last == "number" and value and not is_number:
            unit = as_unit(value) if arguments.get("abbr") != "values" else ""
            said += before_unit + (" " if unit and unit[0] != "×" else "") + unit
            last, before_unit = "unit", ""
        else:
            break
    return (said + words if place == "mid" else said) or None


def val(arguments: Arguments) -> str | None:
    """`5|0.2|u=m`: `5±0.2 m`; `5|3|2|e=6`: `(5 +3/−2)×10^6`; `5|-|7|ul=m|upl=s`: `5–7 m/s`."""
    number, *rest = [as_number(value) for value in positional(arguments)] or [""]
    if rest[:1] and rest[0] in RANGES:
        number += "".join(RANGES.get(value, value) for value in rest)
    elif len(rest) > 1:
        number += f" +{rest[0].lstrip('+')}/−{rest[1].lstrip('-−')}"
    elif rest:
        number += rest[0] if rest[0].startswith("(") else f"±{rest[0].lstrip('±')}"
    unit, per = (arguments.get(one) or arguments.get(one + "l") or "" for one in ("u", "up"))
    unit = f"{unit or 1 if per else unit}{'/' if per else ''}{per}".replace("degC", "°C").replace("degF", "°F")
    if (power := arguments.get("e")) and number:
        number = f"({number})" if rest else number
    number += "×" * bool(power and number) + f"10^{power}" * bool(power)
    gap = "" if unit in ("", *WITHOUT_SPACE) else " "
    said = f"{number}{arguments.get('end', '')}{gap}{unit}{arguments.get('s', '')}"
    return f"{arguments.get('p', '')}{said}" if number else None


def in_units(*units: str) -> Rule:
    """`ft=5|in=11`: `5 ft 11 in`."""
    return lambda arguments: " ".join(f"{arguments[u]} {u}" for u in units if arguments.get(u)) or None


def duration(arguments: Arguments) -> str | None:
    hours, minutes, seconds = (arguments.get(a) or arguments.get(b) or "" for a, b in zip("hms", "123", strict=True))
    parts = [hours, minutes or "0", seconds or "00"] if hours else [minutes or "0", seconds or "00"]
    return ":".join([parts[0], *(part.zfill(2) for part in parts[1:])]) if hours or minutes or seconds else None


def fraction(arguments: Arguments) -> str:
    """`2`: `1/2`; `1|2`: `1/2`; `3|1|2`: `3 1/2`."""
    values = [*filter(None, positional(arguments))][:3]
    whole = f"{values[0]} " if len(values) == 3 else ""
    parts = values[-2:] if len(values) > 1 else ["1", *values]
    return whole + "/".join(f"({part})" if " " in part else part for part in parts) if values else ""


def gauge(arguments: Arguments) -> str | None:
    width = re.fullmatch(r"(\d[\d.,]*) ?(mm|m|in)", arguments.get("1", ""))
    return f"{width[1]} {width[2]}" if width else None


def fossil_range(arguments: Arguments) -> str | None:
    """`370|0`: `370–0 million years ago`; `Late Silurian|Recent`: `Late Silurian–Recent`."""
    text = arguments.get("3") or apply("{1}<–{2}>", arguments)
    return f"{text} million years ago " if NUMBER.fullmatch(text or "") else text


def chemistry(arguments: Arguments) -> str:
    *formula, charge = [*filter(None, positional(arguments))] or [""]
    charge = f"^{charge}" if formula and re.fullmatch(r"\d*[+−-]", charge) else charge
    return re.sub(r"\((\d*[+−-])\)", r"^\1", "".join((*formula, charge))).replace("->", "→")


def power_of_ten(arguments: Arguments) -> str:
    return f"×10^{arguments['1']}" if arguments.get("1") else ""


def ordinal(arguments: Arguments) -> str | None:
    number = arguments.get("1", "").replace(",", "")
    if not number.isdecimal():
        return None
    ending = "th" if number[-2:-1] == "1" else {"1": "st", "2": "nd", "3": "rd"}.get(number[-1], "th")
    return arguments["1"] + ending


def coordinates(arguments: Arguments) -> str | None:
    """`28|N|2|30|E`: `28°N 2°30′E`. Those that are shown only above the article are no words of it."""
    if not set(arguments.get("display", "inline").replace(" ", "").split(",")) & {"inline", "i", "it", "ti"}:
        return ""
    typed = [value for value in positional(arguments) if value and ":" not in value][:8]
    if len(signed := [value for value in typed if NUMBER.fullmatch(value)]) == len(typed) == 2:
        sides = ("NS"[signed[0][0] in "-−"], "EW"[signed[1][0] in "-−"])
        return " ".join(f"{value.lstrip('-−')}°{side}" for value, side in zip(signed, sides, strict=True))
    marks, said = iter("°′″"), ""
    for value in typed:
        if value in ("N", "S", "E", "W"):
            said, marks = f"{said}{value} ", iter("°′″")
        else:
            said += value + next(marks, "")
    return said.strip() if re.fullmatch(r"[^NSEW]+[NS] [^NSEW]+[EW] ", said) else None


# Money

MONEY = {
    code: sign.replace("_", " ")  # `_` for a space
    for code, sign in re.findall(
        r"(\w+) ([^;]+)",
        "usd US$; aud A$; cad C$; nzd NZ$; hkd HK$; sgd S$; twd NT$; brl R$; mxn Mex$; gbp £; eur €; inr ₹; jpy ¥; "
        "cny CN¥; krw ₩; php ₱; ils ₪; try ₺; uah ₴; ngn ₦; rub ₽; thb ฿; vnd ₫; myr RM; zar R; idr Rp_; pkr Rs._; "
        "lkr Rs._; chf CHF_; bdt ৳; ghs GH₵; kzt ₸",
    )
}
SCALES = {"": "", "k": "thousand", "m": "million", "b": "billion", "l": "lakh", "c": "crore", "lc": "lakh crore"}


def currency(arguments: Arguments) -> str | None:
    sign = MONEY.get(arguments.get("2", "usd").lower())
    return f"{sign}{arguments['1']}" if sign and arguments.get("1") else None


def scaled(sign: str) -> Rule:
    """`5|c`: `₹5 crore`, without the conversion."""

    def rule(arguments: Arguments) -> str | None:
        amount, scale = arguments.get("1"), arguments.get("2", "").lower()
        return f"{sign}{amount} {SCALES[scale]}".strip() if amount and scale in SCALES else None

    return rule


# Dates

MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July"),
    *("August", "September", "October", "November", "December"),
)
YEAR = re.compile(r"([-−]?)(\d{1,4})( ?(?:BCE?|CE|AD))?")


def month_number(typed: str) -> int:
    """From 1, of a number or a name; 0 if it is neither."""
    by_name = (n for n, month in enumerate(MONTHS, 1) if len(typed) > 2 and month.lower().startswith(typed.lower()))
    by_number = int(typed) if typed.isdecimal() and len(typed) < 3 else 0
    return by_number if 1 <= by_number <= 12 else next(by_name, 0)


def written(parts: list[str], day_first: bool) -> str | None:
    """`1990`, `January 1990`, `January 2, 1990` or `2 January 1990` of year, month and day; or as it was typed."""
    year, month, day, *_ = [*parts, "", "", ""]
    number = YEAR.fullmatch(year)
    if not number or not (month or day):
        return f"{number[2]} BC" if number and number[1] else year
    year = f"{number[2]} BC" if number[1] else year
    name = MONTHS[month_number(month) - 1] if month_number(month) else None
    if not name or not re.fullmatch(r"\d{0,2}", day):
        return None
    day = day.lstrip("0")
    if not day:
        return f"{name} {year}"
    return f"{day} {name} {year}" if day_first else f"{name} {day}, {year}"


def date(arguments: Arguments) -> str | None:
    """`1993|2|24|08|30`: `08:30, February 24, 1993`."""
    values = [*positional(arguments), *[""] * 7]
    day = written(values[:3], is_set(arguments.get("df")))
    time = ":".join(value.zfill(2) for value in values[3:6] if value.isdecimal())
    zone = {"": "", "Z": " (UTC)"}.get(values[6], f" (UTC{values[6]})")
    return f"{time}, {day}{zone}" if time and day else day


def year(arguments: Arguments) -> str | None:
    return written(positional(arguments)[:1], False)


def years_between(born: list[str], died: list[str]) -> str | None:
    """`56`; `55–56` if only the years are known. None if a year is not known."""
    found = [YEAR.fullmatch(parts[0]) if parts else None for parts in (born, died)]
    if None in found:
        return None
    before, after = (int(year[2]) * (-1 if year[1] or "B" in (year[3] or "") else 1) for year in found)
    most = after - before - (before < 0 < after)  # there is no year 0
    days = [(month_number(p[1]), int(p[2])) for p in (born, died) if len(p) > 2 and p[1] and p[2].isdecimal()]
    return str(most - (days[1] < days[0])) if len(days) == 2 else f"{most - 1}–{most}"


def death(parts: int) -> Rule:
    """A death date of so many parts, then a birth date: `1865|4|15|1809|2|12` is `April 15, 1865 (aged 56)`."""

    def rule(arguments: Arguments) -> str | None:
        values = positional(arguments)
        died, born = values[:parts], values[parts : 2 * parts]
        day = written(died, is_set(arguments.get("df")))
        age = years_between(born, died)
        return f"{day} (aged {age})" if day and age else day

    return rule


def age(arguments: Arguments) -> str | None:
    values = positional(arguments)
    return years_between(values[:3], values[3:6]) if len(values) > 5 else None  # else it is the age today


def film_date(arguments: Arguments) -> str | None:
    """`1997|1|17|Spain|1998|2`: `January 17, 1997 (Spain), February 1998`."""
    values = positional(arguments)
    said = []
    for start in range(0, len(values), 4):
        day = written(values[start : start + 3], is_set(arguments.get("df")))
        if day is None:
            return None
        said.append(f"{day} ({values[start + 3]})" if values[start + 3 : start + 4] not in ([], [""]) else day)
    return ", ".join(said)


def as_of(arguments: Arguments) -> str | None:
    day_first = arguments.get("df", "").lower() not in ("us", "mdy")
    day = arguments.get("alt") or written(positional(arguments)[:3], day_first)
    if not day or arguments.get("alt"):
        return day or None
    words = "since" if is_set(arguments.get("since")) else "as of"
    words = "" if is_set(arguments.get("bare")) else words if is_set(arguments.get("lc")) else words.capitalize()
    return " ".join(filter(None, (words, arguments.get("pre"), day))) + arguments.get("post", "")


def marriage(arguments: Arguments) -> str | None:
    spouse, start, end, *_ = [*positional(arguments), "", "", ""]
    reason = arguments.get("end") or arguments.get("reason") or ""
    reason = {"d": "died", "w": "died", "widowed": "died", "divorced": "div.", "divorce": "div.", "div": "div."}.get(
        reason.lower().rstrip("."), reason
    )
    years = f"m. {start}" if start else ""
    if end:
        years += f"; {reason} {end}" if reason else f"–{end}"
    return f"{spouse} ({years})" if years and spouse else spouse or None


# Words and links


def quotation(author: str, source: str) -> Rule:
    """A paragraph: `text — author, source`. Both may be positional, and have several names."""

    def rule(arguments: Arguments) -> str | None:
        text, *by = (
            apply(f"{{{names}}}", arguments) or ""
            for names in ("1/text/quote/content", f"{author}/author/sign/by", f"{source}/title/source/cite/character")
        )
        by = ", ".join(filter(None, by))
        return f"\n\n{text} — {by}\n\n" if text and by else f"\n\n{text}\n\n" if text else None

    return rule


def interlanguage(arguments: Arguments) -> str | None:
    """`Title|de|Titel|lt=shown`, or in the older order `de|Title|Titel|shown`."""
    values = positional(arguments)
    older = len(values) > 1 and re.fullmatch(r"[a-z]{2,3}", values[0]) and not re.fullmatch(r"[a-z]{2,3}", values[1])
    title = next((value for value in (values[3:4] + values[1:2] if older else values[:1]) if value), "")
    return arguments.get("lt") or title or None


def ship(prefix: str | None) -> Rule:
    """`Hornet|CV-12` is `USS Hornet (CV-12)`; format 2 omits the number, 3 the prefix, 6 both."""

    def rule(arguments: Arguments) -> str | None:
        first, name, number, form, *_ = [*([prefix] if prefix else []), *positional(arguments), "", "", "", ""]
        if form not in ("", "2", "3", "6") or not name:
            return None
        parts = ("" if form in ("3", "6") else first, name, f"({number})" if number and form in ("", "3") else "")
        return " ".join(filter(None, parts))

    return rule


def sic(arguments: Arguments) -> str:
    text = "".join(positional(arguments)[:2])
    return text if is_set(arguments.get("hide")) else f"{text} [sic]".strip()


def verse(arguments: Arguments) -> str | None:
    """`1|John|3:16|KJV`: `1 John 3:16`."""
    values = positional(arguments)[:3]
    last = next((i for i, value in enumerate(values) if ":" in value), 1)
    return " ".join(filter(None, values[: last + 1])) or None


def country(arguments: Arguments) -> str | None:
    name = arguments.get("1") or arguments.get("name")
    return COUNTRIES.get(name, name) if name else None


def changed(change: Callable[[str], str]) -> Rule:
    return lambda arguments: change(arguments.get("1", ""))


NOTES = {
    **dict.fromkeys(("flat", "b"), "♭"),
    **dict.fromkeys(("sharp", "#"), "♯"),
    **dict.fromkeys(("natural", "n"), "♮"),
    **dict.fromkeys(("doubleflat", "bb"), "𝄫"),
    **dict.fromkeys(("doublesharp", "##", "x"), "𝄪"),
}


def music(arguments: Arguments) -> str | None:
    kind, above, below, *_ = [*positional(arguments), "", "", ""]
    return f"{above}/{below}" if kind == "time" and above and below else NOTES.get(kind)


# Rules, and the names of the templates that they are for, in lower case.
RULES: Iterable[tuple[Rule, str]] = (
    # Wrappers, which only change how their words look.
    (
        "{1/text/content}",
        "nowrap; nobr; nobreak; small; smaller; big; bigger; large; larger; huge; midsize; em; strong; nobold; "
        "noitalic; normal; sc; sc1; sc2; smallcaps; sub; center; centre; block center; left; right; math; mvar; var; "
        "mono; code; kbd; samp; key; underline; overline; overbar; strike; strikethrough; del; tt; italics; "
        "italic; bold; highlight; poem; unicode; polytonic; hebrew; nastaliq; nq; defn; stack; notatypo; allow wrap",
    ),
    ("{1/abbr}", "abbr; tooltip; abbrlink; hover title"),
    ("{2/1/text}", "resize; longitem; columns-list; columns list"),
    ("{2/text}", "color; colour; colored text; background color; align; aligned table cell; text color"),
    ("{3/2/text}", "font color; fontcolor; colored link"),
    ("{text/2/1}", "font"),
    ("{text/1}", "vanchor; visible anchor"),
    ("{2/text}", "legend; legend0; legend2; legend inline; legend-line; leftlegend; rightlegend; color box"),
    ("⟨{1}⟩", "angbr; angle bracket; angbr ipa; grapheme"),
    ("'{1}'", "gloss; single quotes"),
    ('"{1}"', '"; tq'),
    ("{1}:", "term"),
    (joined("+"), "keypress; key press"),
    (sic, "sic"),
    # Quotations.
    (
        quotation("2", "3"),
        "quote; blockquote; block quote; bquote; quotation; poemquote; poem quote; quote frame; quote box; quotebox",
    ),
    (quotation("4", "5"), "cquote; rquote; centered pull quote; pull quote; pquote"),
    ("\n\n{1}\n\n{2}< — {attr1}><, {attr2}>\n\n", "verse translation"),
    # Languages.
    ("{2/text}", "lang; rtl-lang; native name; native phrase; script; wikt-lang"),
    ("{3/2/text}", "transl; transliteration"),
    ("{1/text}<, {2/translit/r/tr}><, lit. '{3/lit/translation}'>", "lang-"),
    ("{2/text}<, {3/translit}><, lit. '{4/lit/translation}'>", "langx"),
    ("{1}", "script/; nihongo2; nihongo foot; okina"),
    ("{name1}<, {name2}><, {name3}><, {name4}><, {name5}>", "native name list"),
    (in_brackets("1", "2", "3", "4", "5"), "nihongo; nihongo krt"),
    (in_brackets("3", "2", "1"), "nihongo3"),
    (in_brackets("1", "2"), "ruby; ruby-ja; ruby-zh-p; ruby-zh-b"),
    (
        "<; Chinese: {c/1}><; simplified Chinese: {s}><; traditional Chinese: {t}><; pinyin: {p/hp}><; Wade–Giles: {w}>"
        "<; Jyutping: {j}><; Cantonese Yale: {cy}><; Pe̍h-ōe-jī: {poj}><; lit. '{l}'>",
        "zh; lang-zh",
    ),
    ("<; Korean: {hangul/1}><; Hanja: {hanja/2}><; RR: {rr/3}><; MR: {mr/4}>", "korean; ko-hhrm"),
    ("lit. '{1}'< or '{2}'>", "literal translation; lit; literally"),
    ("{2}", "audio"),
    # Lists.
    (
        joined("\n* ", "\n* "),
        "ubl; unbulleted list; ublist; hlist; plainlist; plain list; flatlist; flat list; vunblist; bulleted list; "
        "blist; unordered list; ordered list; collapsible list; nblist",
    ),
    ("<{col1}>< {col2}>< {col3}>< {col4}>< {col5}>".replace(" ", "\n"), "columns"),
    (joined(", "), "cslist; comma separated entries; enum"),
    (joined(""), "linktext"),
    # Numbers, quantities and formulas.
    (convert, "convert; cvt"),
    (val, "val"),
    (joined(" "), "gaps"),
    ("{1}", "nts; number table sorting; format price; formatnum:; padleft:"),
    (in_units("m", "cm", "ft", "in"), "height"),
    (in_units("kg", "st", "lb", "oz"), "weight"),
    (duration, "duration"),
    (gauge, "railgauge; track gauge"),
    (fossil_range, "fossil range; fossilrange; long fossil range; geological range"),
    (fraction, "frac; fraction; sfrac; tfrac"),
    (chemistry, "chem; chem2"),
    ("{1}-{2}", "nuclide; nuclide2; simplenuclide; simplenuclide2"),
    (power_of_ten, "e; x10^"),
    ("10^{1}", "10^"),
    (changed(superscript), "sup"),
    (ordinal, "ordinal; ord"),
    ("No.< {1}>", "no.; numero; number sign"),
    ("{1}°", "deg"),
    ("√{1}", "sqrt"),
    ("|{1}|", "abs"),
    (coordinates, "coord"),
    ("{upper}/{lower}", "dentalformula"),
    # Money.
    *((f"{sign}<{{1}}>", code) for code, sign in MONEY.items()),
    *((f"{sign}<{{1}}>", sign.lower()) for sign in ("US$", "A$", "C$", "NZ$", "HK$", "S$", "NT$", "R$", "CN¥")),
    *((f"{sign}<{{1}}>", sign) for sign in "£€₹¥₩₱₦₪₺₴"),
    ("₹<{1}>", "indian rupee"),
    ("£<{1}>", "pound sterling"),
    ("€<{1}>", "euro"),
    ("¥<{1}>", "yen"),
    ("₱<{1}>", "philippine peso"),
    ("₦<{1}>", "naira"),
    ("₩<{1}>", "won sign; south korean won"),
    ("<£{l/1}>< {s/2}s>< {d/3}d>", "£sd; pounds, shillings, and pence"),
    (currency, "currency"),
    *((scaled(MONEY[code]), f"{code}convert; {code} convert") for code in ("inr", "jpy", "krw", "php", "cny", "pkr")),
    # Dates.
    (
        date,
        "birth date; birth date and age; bda; dob; birth-date; birth-date and age; death date; death-date; start date",
    ),
    (date, "start-date; start date and age; start-date and age; end date; end-date; dts; date table sorting; date"),
    (year, "birth year and age; bya; start year"),
    (death(3), "death date and age; dda"),
    (death(1), "death year and age; dya"),
    ("{1}", "death-date and age"),
    (film_date, "film date; release date"),
    (as_of, "as of; asof"),
    (age, "age; age in years"),
    ("{1}< [O.S. {3}]>< {2}>", "oldstyledate"),
    ("c.< {1}>< – {2}>", "circa; c.; ca."),
    ("fl.< {1}>< – {2}>", "floruit; fl."),
    ("r.< {1}>< – {2}>", "reign; r."),
    ("b.< {1}>", "b."),
    ("d.< {1}>", "d."),
    (marriage, "marriage"),
    # Links and names.
    ("{2/1/url}", "url"),
    ("{name/2/1/url}", "plain link; plainlink"),
    (interlanguage, "ill; illm; interlanguage link; interlanguage link multi; iw; link-interwiki"),
    ("{1}< § {2}>", "section link; slink"),
    (country, "flag; flagu; flagcountry; flag country"),
    ("{1}< by {2}>", "based on"),
    (verse, "bibleverse; bibleref; bibleref2; bibleverse-nb"),
    ("US patent {1}", "us patent"),
    ("{1}{2}<.{3}>", "icd10"),
    ("{1}", "icd9"),
    *(
        (f"{number} {{1}}", number.lower())
        for number in ("ISBN", "ISSN", "OCLC", "PMID", "LCCN", "RFC", "DOI", "JSTOR")
    ),
    *(
        (ship(prefix), prefix.lower())
        for prefix in re.findall(
            r"\w+",
            "USS USNS USCGC USAT HMS RMS HMAS HMCS HMNZS SS MV MS SMS INS HNoMS HSwMS HNLMS HDMS RFA ORP",
        )
    ),
    (ship(None), "ship"),
    ("{1}-class< {2}>", "sclass; sclass-"),
    # Signs, and words that have a template.
    (music, "music"),
    ("♭", "flat"),
    ("♯", "sharp"),
    ("♮", "natural"),
    ("{1}/{2}", "time signature"),
    ("{1=Yes}", "yes"),
    ("{1=No}", "no"),
    ("{1=N/A}", "n/a; na"),
    ("{1=Won}", "won"),
    ("{1=Nominated}", "nom"),
    ("{1=TBA}", "tba"),
    (" (surrendered)", "surrendered"),
    *((f" ({word})", word.lower()) for word in ("POW", "KIA", "WIA", "MIA")),
    ("–", "ndash; en dash; endash; –"),
    ("—", "mdash; em dash; emdash; —; mdashb"),
    (" – ", "snd; snds; spaced ndash; spaced en dash; spaced en dash space"),
    (" — ", "spaced mdash; spaced em dash"),
    (" · ", "·; •; middot; dot; bullet; bull; interpunct"),
    (" / ", "\\"),
    ("-", "nbh; nbhyph; non-breaking hyphen"),
    *((sign, sign) for sign in ("'", "'s", "=", "`", "±", "×", "→", "†", "‡")),
    ("'\"", "' \"; '\""),
    ("\"'", "\" '; \"'"),
    ('"', '-"'),
    ("'", "-'; apostrophe"),
    ("|", "!; pipe"),
    ("||", "!!"),
    (":", "colon"),
    ("−", "minus"),
    ("±", "plusminus; +-"),
    ("×", "times"),
    ("π", "pi"),
    ("†", "dagger; extinct"),
    ("‡", "double dagger"),
    ("⇌", "eqm"),
    ("✓", "check mark; tick"),
    (" ", "nbsp; spaces; space; sp; thinsp; thin space; hair space; hairsp; em space; en space; nnbsp; gap; tab"),
    ("\n", "br; break; crlf; clear; -; clear left; clear right; clr"),
    ("", "wbr; zwsp; zwj; zwnj; shy; lrm; rlm; 0; pad; nowrap begin; nowrap end"),
    # Functions of the wiki.
    (changed(str.lower), "lc:"),
    (changed(str.upper), "uc:"),
    (changed(lambda text: text[:1].lower() + text[1:]), "lcfirst:"),
    (changed(lambda text: text[:1].upper() + text[1:]), "ucfirst:"),
)
TEMPLATES = {name: rule for rule, names in RULES for name in names.split("; ")}
PREFIX = re.compile(r"(lang-|script/).*")  # of names that are many: one for each language, and for each script

UNKNOWN = "templates whose words are not known"
# Templates that stand for no words of the text, or for what passages of text cannot hold, by what they are.
WORDLESS = {
    kind: re.compile("|".join(names.split("; ")))
    for kind, names in (
        (
            "references",
            r"cite .*; citation; citations?-\w+; sfn\w*; harv\w*; rp; r; refn; efn(-\w+)?; notelist(-\w+)?; reflist; "
            r"#tag:ref; ref label; ref; ref-\w+; note; note label; refbegin; refend; inflation[-/]fn; gutenberg "
            r"author; internet archive author; librivox author; wikicite; imdb (name|title)",
        ),
        (
            "requests to editors",
            r"citation needed.*; cn; fact; clarify.*; which\??; who\??; when\??; where\??; why\??; how\??; by "
            r"whom\??; according to whom\??; dubious.*; vague; (page|attribution|example) needed; quantify; qualify "
            r"evidence; full; full citation needed; better source.*; failed verification; verify.*; unreliable "
            r"source.*; more .*; refimprove.*; no footnotes; unreferenced.*; one source; primary sources.*; expand "
            r".*; update.*; original research.*; weasel.*; peacock.*; undue.*; pov.*; npov.*; globalize.*; multiple "
            r"issues; cleanup.*; copy ?edit.*; merge.*; lead (rewrite|too short|missing|too long); specify; needs? "
            r".*; disputed.*; notability; as of\?; jargon.*; tone.*; technical; technical reasons; confusing.*; "
            r"synthesis.*; relevance.*; off-topic.*; dead link; contradict.*; incomplete.*; elucidate; in-text.*; "
            r"stub; .*[- ]stub; coord missing; contains .*",
        ),
        (
            "layout",
            r"use (dmy|mdy|ymd) dates; use .* english; engvarb?; (good|featured) article; pp; pp-.*; (no)?bots; short "
            r"description; italic title; displaytitle:; defaultsort:; lowercase.*; anchors?; shortcut; harvid; "
            r"sfnref; col-.*; div col.*; col(begin|end); multicol.*; (start|end)(plain|flat)list; toc.*; compact toc; "
            r"horizontal toc; increase; decrease; steady; flagicon.*; flagdeco; \w\w icon; in lang; "
            r"algorithm-(begin|end); lunar coords.*; stack (begin|end)",
        ),
        (
            "links to other pages and projects",
            r"authority control; taxonbar; subject bar; portal.*; commons.*; wiktionary.*; wikt; wikisource.*; "
            r"wikiquote.*; wikinews.*; wikivoyage.*; wikibooks.*; wikispecies; wikiversity.*; sister .*; official "
            r"website; navbox.*; .* (sidebar|navbox|topics); campaignbox.*; sidebar.*",
        ),
        (
            "notes above a section",
            r"main; main (article|articles|category); see; see also; also; further; about; other "
            r"(uses|people|places|ships).*; redirect.*; for; for-multi; for\d?; details\d?; distinguish.*; hatnote.*; "
            r"broader; not to be confused.*; related articles; selfref; elect; family name hatnote",
        ),
        ("pronunciations", r"ipa; ipa-\w+; ipac-\w+; ipa\w?link; respell.*; pronunciation.*; pron-en; usdict"),
        (
            "images, diagrams and recordings",
            r"multiple images?; (double|triple|wide|tall|css|annotated|superimpose) image.*; panorama; listen; "
            r"external media; maplink; mapframe; location map.*; gallery; clade.*; cladogram; phylo\w*; family "
            r"?tree.*; tree chart.*; chart; chart[ /].*; ahnentafel.*; graph:.*; map caption",
        ),
        (
            "tables",
            r"bar (box|percent|chart|pixel).*; pie chart; historical populations?; us census population; weather box; "
            r".* weatherbox; largest cities.*; charmap; s-\w+; succession box; election box.*; "
            r"football ?box.*; medal\w+; periodic table.*; spaceflight crew; letter other reps",
        ),
    )
}
# Names of countries by the codes of ISO 3166 and, where they differ, of the Olympic Games: `{{FRA}}`, `{{flag|FRA}}`.
COUNTRIES = {
    code: name
    for codes, name in re.findall(
        r"((?:[A-Z]{2,3} )+)([^;]+)",
        "AFG Afghanistan; ALB Albania; DZA ALG Algeria; AND Andorra; AGO ANG Angola; AIA Anguilla; ATG Antigua and "
        "Barbuda; ARG Argentina; ARM Armenia; ABW ARU Aruba; AUS Australia; AUT Austria; AZE Azerbaijan; BHS BAH "
        "Bahamas; BHR Bahrain; BRN BRU Brunei; BGD BAN Bangladesh; BRB BAR Barbados; BLR Belarus; BEL Belgium; BLZ "
        "BIZ Belize; BEN Benin; BMU BER Bermuda; BTN BHU Bhutan; BOL Bolivia; BIH Bosnia and Herzegovina; BWA BOT "
        "Botswana; BVT Bouvet Island; BRA Brazil; VGB IVB British Virgin Islands; BGR BUL Bulgaria; BFA BUR Burkina "
        "Faso; BDI Burundi; KHM CAM Cambodia; CMR Cameroon; CAN Canada; CPV Cape Verde; CYM CAY Cayman Islands; CAF "
        "Central African Republic; TCD CHA Chad; CHL CHI Chile; CHN China; COL Colombia; COM Comoros; COG CGO "
        "Republic of the Congo; COD Democratic Republic of the Congo; COK Cook Islands; CRI Costa Rica; HRV CRO "
        "Croatia; CUB Cuba; CUR CUW Curaçao; CYP Cyprus; CZE Czech Republic; DNK DEN Denmark; DJI Djibouti; DMA "
        "Dominica; DOM Dominican Republic; TLS East Timor; ECU Ecuador; EGY Egypt; SLV ESA El Salvador; GNQ GEQ "
        "Equatorial Guinea; ERI Eritrea; EST Estonia; SWZ Eswatini; ETH Ethiopia; FLK Falkland Islands; FRO FAR Faroe "
        "Islands; FJI FIJ Fiji; FIN Finland; FRA France; GUF French Guiana; PYF French Polynesia; GAB Gabon; GMB GAM "
        "Gambia; GEO Georgia; DEU GER Germany; GHA Ghana; GIB Gibraltar; GRC GRE Greece; GRL Greenland; GRD GRN "
        "Grenada; GLP Guadeloupe; GUM Guam; GTM GUA Guatemala; GGY Guernsey; GIN GUI Guinea; GNB GBS Guinea-Bissau; "
        "GUY Guyana; HTI HAI Haiti; HND HON Honduras; HKG Hong Kong; HUN Hungary; ISL Iceland; IND India; IDN INA "
        "Indonesia; IRN IRI Iran; IRQ Iraq; IRL Ireland; IOM IMN Isle of Man; ISR Israel; ITA Italy; CIV Ivory Coast; "
        "JAM Jamaica; JPN Japan; JEY Jersey; JOR Jordan; KAZ Kazakhstan; KEN Kenya; KIR Kiribati; KOS Kosovo; KWT KUW "
        "Kuwait; KGZ Kyrgyzstan; LAO Laos; LVA LAT Latvia; LBN LIB Lebanon; LSO LES Lesotho; LBR Liberia; LBY LBA "
        "Libya; LIE Liechtenstein; LTU Lithuania; LUX Luxembourg; MAC Macau; MDG MAD Madagascar; MWI MAW Malawi; MYS "
        "MAS Malaysia; MDV Maldives; MLI Mali; MLT Malta; MHL Marshall Islands; MTQ Martinique; MRT MTN Mauritania; "
        "MUS MRI Mauritius; MYT Mayotte; MEX Mexico; FSM Federated States of Micronesia; MDA Moldova; MCO MON Monaco; "
        "MNG MGL Mongolia; MNE Montenegro; MSR Montserrat; MAR Morocco; MOZ Mozambique; MMR MYA Myanmar; NAM Namibia; "
        "NRU Nauru; NPL NEP Nepal; NLD NED Netherlands; NCL New Caledonia; NZL New Zealand; NIC NCA Nicaragua; NER "
        "NIG Niger; NGA NGR Nigeria; NIU Niue; PRK North Korea; MKD North Macedonia; NOR Norway; OMN OMA Oman; PAK "
        "Pakistan; PLW Palau; PSE PLE Palestine; PAN Panama; PNG Papua New Guinea; PRY PAR Paraguay; PER Peru; PHL "
        "PHI Philippines; POL Poland; PRT POR Portugal; PRI PUR Puerto Rico; QAT Qatar; REU Réunion; ROU Romania; RUS "
        "Russia; RWA Rwanda; SHN Saint Helena, Ascension and Tristan da Cunha; KNA SKN Saint Kitts and Nevis; LCA "
        "Saint Lucia; MAF Saint Martin; SPM Saint Pierre and Miquelon; VCT VIN Saint Vincent and the Grenadines; WSM "
        "SAM Samoa; SMR San Marino; STP São Tomé and Príncipe; SAU KSA Saudi Arabia; SEN Senegal; SRB Serbia; SYC SEY "
        "Seychelles; SLE Sierra Leone; SGP SIN Singapore; SXM Sint Maarten; SVK Slovakia; SVN SLO Slovenia; SLB SOL "
        "Solomon Islands; SOM Somalia; ZAF RSA South Africa; SGS South Georgia and the South Sandwich Islands; KOR "
        "South Korea; SSD South Sudan; ESP Spain; LKA SRI Sri Lanka; SDN SUD Sudan; SUR Suriname; SWE Sweden; CHE SUI "
        "Switzerland; SYR Syria; TWN Taiwan; TPE Chinese Taipei; TJK Tajikistan; TZA TAN Tanzania; THA Thailand; TGO "
        "TOG Togo; TON TGA Tonga; TTO TRI Trinidad and Tobago; TUN Tunisia; TUR Turkey; TKM Turkmenistan; TCA Turks "
        "and Caicos Islands; TUV Tuvalu; UGA Uganda; UKR Ukraine; ARE UAE United Arab Emirates; GBR UK United "
        "Kingdom; USA US United States; VIR ISV United States Virgin Islands; URY URU Uruguay; UZB Uzbekistan; VUT "
        "VAN Vanuatu; VAT Vatican City; VEN Venezuela; VNM VIE Vietnam; ESH Western Sahara; YEM Yemen; ZMB ZAM "
        "Zambia; ZWE ZIM Zimbabwe; EU European Union; URS Soviet Union; YUG Yugoslavia; GDR East Germany; FRG West "
        "Germany; TCH Czechoslovakia; ENG England; SCO Scotland; WAL Wales; NIR Northern Ireland",
    )
    for code in codes.split()
}
