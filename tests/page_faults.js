() => {
  const found = [];
  const text = element => (element.textContent || "").trim();
  const all = selector => [...document.querySelectorAll(selector)];
  if (!/^(en|zh-Hans)$/.test(document.documentElement.lang)) found.push("no language");
  if (!document.title.trim()) found.push("no title");
  if (all("main").length !== 1) found.push("not one main");
  if (all("h1").length !== 1) found.push("not one h1");
  let level = 0;
  for (const heading of all("h1, h2, h3, h4")) {
    const next = Number(heading.tagName[1]);
    if (next > level + 1) found.push(`heading ${text(heading)}: h${next} after h${level}`);
    level = next;
  }
  for (const field of all("input:not([type=hidden]), select, textarea")) {
    if (!field.labels.length || !text(field.labels[0])) found.push(`no label: ${field.outerHTML}`);
  }
  for (const control of all("a, button, summary")) if (!text(control)) found.push(`no name: ${control.outerHTML}`);
  const names = all("main form:not(.questions) button").map(text);
  if (new Set(names).size !== names.length) found.push(`buttons of one name: ${names}`);
  for (const image of all("svg:not([aria-hidden])")) {
    if (!image.getAttribute("aria-label")) found.push(`no name: ${image.outerHTML}`);
  }
  for (const table of all("table")) if (!table.querySelector("th[scope=col]")) found.push("table without headers");
  for (const nav of all("nav")) if (!nav.getAttribute("aria-label")) found.push("nav without a name");
  const ids = all("[id]").map(element => element.id);
  if (new Set(ids).size !== ids.length) found.push(`an id twice: ${ids}`);
  for (const element of all("[aria-describedby], [aria-labelledby]")) {
    const wanted = `${element.getAttribute("aria-describedby") ?? ""} ${element.getAttribute("aria-labelledby") ?? ""}`;
    for (const id of wanted.trim().split(/ +/)) if (!document.getElementById(id)) found.push(`no element ${id}`);
  }
  const width = document.documentElement.scrollWidth;
  if (width > innerWidth) found.push(`wider than the window: ${width}`);
  return found;
}
