"""What a run has done, as one page for a browser: `report.html`, and `python -m atlas.report RUN`.

`record` reads what a run wrote about itself, `questions` reads and judges its result files, `packing` makes them small;
`sections` writes the parts of the page, `charts` their curves, and `page` puts all together in `report.html`.
`look.css` and `look.js` are shared with the page of ask.py.

May import: config, files, metrics.
"""
