// Better with script, whole without: shows what was chosen, says early what the server would say,
// shows the upload's progress, and blends the heat over the scan.
const form = document.getElementById("form");
if (form) {
  const input = form.querySelector("input[type=file]");
  const button = form.querySelector("button");
  const [error, previews, working, progress] = ["error", "previews", "working", "progress"].map((id) => document.getElementById(id));

  const complaint = (files) => {
    const { mostBytes, mostFiles } = input.dataset;
    const total = files.reduce((sum, file) => sum + file.size, 0);
    const empty = files.find((file) => file.size === 0);
    if (files.length > mostFiles)
      return `${files.length} files were sent, but at most ${mostFiles} are read at once.`;
    if (total > mostBytes)
      return `The upload is larger than the ${Math.floor(mostBytes / 2 ** 20)} MB allowed; send fewer or smaller files.`;
    return empty ? `${empty.name} is empty; choose the file again.` : "";
  };

  const complain = (sentence) => {
    error.textContent = sentence;
    error.hidden = !sentence;
    input.setAttribute("aria-invalid", Boolean(sentence));
    if (sentence) error.focus();
  };

  const preview = (file) => {
    const item = document.createElement("li");
    const image = new Image(96, 96);
    image.alt = "";
    image.src = URL.createObjectURL(file);
    image.onload = () => URL.revokeObjectURL(image.src);
    image.onerror = () => image.remove();
    item.append(image, file.name);
    item.title = file.name;
    return item;
  };

  const look = () => {
    const files = [...input.files];
    complain(complaint(files));
    previews.replaceChildren(...files.slice(0, 12).map(preview));
    if (files.length > 12) previews.append(Object.assign(document.createElement("li"), { textContent: `and ${files.length - 12} more` }));
  };

  const busy = (words, share = 0) => {
    working.textContent = words;
    progress.value = share;
    button.disabled = Boolean(words);
    progress.hidden = !words;
  };

  const send = () => {
    const request = new XMLHttpRequest();
    const fail = (sentence) => {
      busy("");
      complain(sentence);
    };
    request.open("POST", form.dataset.api);
    request.responseType = "json";
    request.upload.onprogress = (event) => busy("Sending …", event.loaded / event.total);
    request.upload.onload = () => busy(input.files.length > 1 ? "Reading the scans …" : "Reading the scan …", 1);
    request.onerror = () => fail("The server cannot be reached; try again.");
    request.onload = () => {
      const answer = request.response ?? {};
      if (answer.id) location.assign(form.dataset.results.replace("ID", answer.id));
      else fail(answer.error ?? "The server gave no answer; try again.");
    };
    busy("Sending …");
    request.send(new FormData(form));
  };

  input.addEventListener("change", look);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const sentence = complaint([...input.files]);
    if (sentence) complain(sentence);
    else send();
  });
  for (const kind of ["dragover", "dragleave", "drop"])
    form.addEventListener(kind, (event) => {
      event.preventDefault();
      form.classList.toggle("over", kind === "dragover");
      if (kind !== "drop" || !event.dataTransfer.files.length) return;
      input.files = event.dataTransfer.files;
      look();
    });
  addEventListener("pageshow", () => busy("")); // coming back with the browser's button
}

const opacity = document.getElementById("opacity");
if (opacity) {
  const heat = document.getElementById("heat");
  opacity.hidden = false;
  opacity.addEventListener("input", (event) => (heat.style.opacity = event.target.value / 100));
}
