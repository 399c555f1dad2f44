// Better with script, whole without: shows what was chosen, says early what the server would say.
const form = document.getElementById("form");
if (form) {
  const input = form.querySelector("input[type=file]");
  const error = document.getElementById("error");
  const previews = document.getElementById("previews");
  const working = document.getElementById("working");

  const complaint = (files) => {
    const megabytes = input.dataset.mostBytes / 2 ** 20;
    const total = files.reduce((sum, file) => sum + file.size, 0);
    if (files.length > input.dataset.mostFiles)
      return `${files.length} files were sent, but at most ${input.dataset.mostFiles} are read at once.`;
    if (total > input.dataset.mostBytes)
      return `The upload is larger than the ${megabytes} MB allowed; send fewer or smaller files.`;
    return "";
  };

  const preview = (file) => {
    const image = new Image();
    image.alt = file.name;
    image.src = URL.createObjectURL(file);
    image.onload = () => URL.revokeObjectURL(image.src);
    image.onerror = () => image.remove();
    return image;
  };

  const look = () => {
    const files = [...input.files];
    error.textContent = complaint(files);
    error.hidden = !error.textContent;
    previews.replaceChildren(...(error.textContent ? [] : files.slice(0, 8).map(preview)));
  };

  input.addEventListener("change", look);
  form.addEventListener("submit", (event) => {
    if (complaint([...input.files])) return event.preventDefault();
    working.hidden = false;
    form.querySelector("button").disabled = true;
  });
  // Coming back with the browser's button finds the form ready again.
  addEventListener("pageshow", () => {
    working.hidden = true;
    form.querySelector("button").disabled = false;
  });
}
