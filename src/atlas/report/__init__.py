"""What a run has done, as one page for a browser: `report.html`, and `python -m atlas.report RUN`.

`record` reads what a run wrote about itself, `questions` reads its result files, `charts` draws curves, `packing` makes
everything small, and `page` writes the page. `page.html` is its form; `look.css` and `look.js` are shared with the page
of ask.py.

May import: files, metrics.
"""
