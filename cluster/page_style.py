"""The style of the pages that Proctor writes: no fonts and no files from elsewhere, for light and dark."""

STYLE = """
:root { color-scheme: light dark; --back: #f6f7f9; --card: #ffffff; --ink: #1d2530; --dim: #566070; --line: #d5dae1;
  --link: #1f5f9e; --miss: #b3261e; --warn: #8a5a00; --hit: #1c6b43; }
@media (prefers-color-scheme: dark) {
  :root { --back: #11141a; --card: #1b2029; --ink: #e8ebf0; --dim: #a3adbb; --line: #343c49; --link: #8cc0f5;
    --miss: #ff8a80; --warn: #f0c060; --hit: #7bd3a4; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1480px; padding: 1.5rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.8rem; } h2 { margin: 0 0 .6rem; font-size: 1.35rem; }
h3 { margin: 1.6rem 0 .2rem; font-size: 1.1rem; } h3 small { color: var(--dim); font-weight: normal; }
a { color: var(--link); } header p, .note { margin: .2rem 0 .6rem; color: var(--dim); }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: 1rem 0; }
section, details { margin: 1.2rem 0; padding: 1.2rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.scroll { margin: 1rem 0; overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { padding: .2rem .7rem; text-align: left; font-weight: 600; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
thead th { color: var(--dim); font-weight: 500; vertical-align: bottom; white-space: normal; }
th:first-child { text-align: left; }
.plot { display: block; max-width: 100%; max-height: 480px; border-radius: 8px; background: #fff; }
.curves { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 6fr); gap: 1rem; align-items: start; }
.curves .plot { width: 100%; max-height: none; }
@media (max-width: 800px) { .curves { grid-template-columns: minmax(0, 1fr); } }
.wall { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 1rem; }
.exhibit { margin: 0; padding: .5rem; border: 1px solid var(--line); border-radius: 8px; }
.exhibit div { display: grid; grid-template-columns: 1fr 1fr; gap: 4px; }
.exhibit img { display: block; width: 100%; height: auto; border-radius: 4px; }
figcaption { margin-top: .3rem; font-size: .9rem; } figcaption span { color: var(--dim); overflow-wrap: anywhere; }
.miss b { color: var(--miss); } .false-reject b { color: var(--warn); } .hit b { color: var(--hit); }
dt { font-weight: 600; } dd { margin: 0 0 .5rem; color: var(--dim); }
summary { cursor: pointer; } pre { overflow-x: auto; }
"""
