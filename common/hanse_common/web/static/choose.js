// Adds a button to choose a text file, whose content goes into the text area that data-choose names. Without scripts
// there is no such button, and text is pasted.
"use strict";

for (const place of document.querySelectorAll("[data-choose]")) {
  const into = document.getElementById(place.dataset.choose);
  const label = document.createElement("label");
  const file = document.createElement("input");
  file.type = "file";
  file.id = "chosen-file";
  label.htmlFor = file.id;
  label.textContent = place.dataset.label;
  file.addEventListener("change", async () => {
    if (file.files.length && file.files[0].size <= Number(place.dataset.bytes)) {
      into.value = await file.files[0].text();
    }
  });
  place.append(label, file);
}
