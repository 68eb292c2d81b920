// Lets a photo be dropped and pasted, and sends it as soon as it is chosen; what it shows comes into this page. Without
// scripts the form is sent by its button. What a screen reader is told stands in #said; a later photo ends an earlier one.
"use strict";

const form = document.getElementById("look");
const result = document.getElementById("result");
const said = document.getElementById("said");
const fields = [...form.querySelectorAll("input[type=file]")];
let asking = null;

const tell = (fragment, key) => {
  for (const field of fields) {
    field.value = "";
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-describedby");
  }
  result.replaceChildren(...fragment.childNodes);
  result.removeAttribute("aria-busy");
  const trouble = document.getElementById("photo-error");
  if (trouble) {
    fields[0].setAttribute("aria-invalid", "true");
    fields[0].setAttribute("aria-describedby", trouble.id);
  }
  // Heard, and not seen a second time.
  said.className = "hidden";
  said.textContent = (trouble ?? document.getElementById("verdict"))?.innerText ?? "";
  const place = document.querySelector(".seen") ?? trouble;
  const quick = matchMedia("(prefers-reduced-motion: reduce)").matches;
  place?.scrollIntoView({ block: "nearest", behavior: quick ? "auto" : "smooth" });
};

const trouble = (id) => {
  const box = document.createElement("div");
  const inner = document.createElement("div");
  inner.id = "photo-error";
  inner.append(document.getElementById(id).content.cloneNode(true));
  box.append(inner);
  tell(box);
};

const look = async (file) => {
  asking?.abort();
  const mine = (asking = new AbortController());
  if (file.size > Number(form.dataset.bytes)) return trouble("too-large");
  said.className = "";
  said.textContent = said.dataset.looking;
  result.setAttribute("aria-busy", "true");
  const body = new FormData();
  body.append("key", form.elements.key.value);
  body.append("photo", file, file.name || "photo");
  try {
    const answer = await fetch(form.action, { method: "POST", body, signal: mine.signal });
    const found = new DOMParser().parseFromString(await answer.text(), "text/html");
    const shown = found.getElementById("result");
    if (!shown) {
      document.documentElement.replaceWith(document.adoptNode(found.documentElement)); // an error's page
      return;
    }
    const address = new URL(answer.url);
    if (answer.redirected) {
      history.pushState(null, "", address);
      document.querySelector(".language input[name=to]").value = address.pathname;
    }
    tell(document.adoptNode(shown));
  } catch (error) {
    if (error.name !== "AbortError") trouble("gone");
  }
};

form.classList.add("live");
for (const field of fields) {
  field.addEventListener("change", () => field.files.length && look(field.files[0]));
}
form.addEventListener("submit", (event) => {
  event.preventDefault();
  const chosen = fields.find((field) => field.files.length);
  if (chosen) look(chosen.files[0]);
});
addEventListener("popstate", () => location.reload());

let inside = 0;
const over = (on) => form.classList.toggle("over", on);
const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
addEventListener("dragenter", (event) => {
  if (holdsFiles(event)) over(++inside > 0);
});
addEventListener("dragleave", (event) => {
  if (holdsFiles(event)) over(--inside > 0);
});
addEventListener("dragover", (event) => holdsFiles(event) && event.preventDefault());
addEventListener("drop", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  over(false);
  inside = 0;
  if (event.dataTransfer.files.length) look(event.dataTransfer.files[0]);
});
addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files ?? [])].find((each) => each.type.startsWith("image/"));
  if (file) {
    event.preventDefault();
    look(file);
  }
});
