// Keeps parts of a page up to date. An element with data-refresh says where they come from, and with data-every how
// often, in seconds. What is fetched has elements with ids; each one's content replaces that of the page's element with
// the id, unless it is the same or the keyboard is in it. When nothing comes any more, the element named by data-stale
// is shown.
"use strict";

for (const place of document.querySelectorAll("[data-refresh]")) {
  const stale = document.getElementById(place.dataset.stale);
  const look = async () => {
    let found = null;
    try {
      const answer = await fetch(place.dataset.refresh);
      if (answer.ok) found = new DOMParser().parseFromString(await answer.text(), "text/html");
    } catch {
      // the page's server is gone: said below
    }
    stale.hidden = found !== null;
    for (const part of found ? found.body.children : []) {
      const old = document.getElementById(part.id);
      if (old && old.innerHTML !== part.innerHTML && !old.contains(document.activeElement)) {
        old.replaceChildren(...part.childNodes);
      }
    }
    setTimeout(look, 1000 * place.dataset.every);
  };
  setTimeout(look, 1000 * place.dataset.every);
}
