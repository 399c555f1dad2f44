// Works without JavaScript; with it: shows what was chosen, says early what the server would say,
// shows the upload's progress, and blends the heat over the scan.
const form = document.getElementById("form");
if (form) {
  const inputs = [...form.querySelectorAll("input[type=file]")];
  const [input] = inputs;
  const button = form.querySelector("button");
  const [error, previews, working, progress] = ["error", "previews", "working", "progress"].map((id) => document.getElementById(id));

  const chosen = () => inputs.flatMap((each) => [...each.files]);
  const megabytes = (bytes) => Math.ceil(bytes / 2 ** 20);

  const complaint = (files) => {
    const { mostBytes, mostFiles } = input.dataset;
    const total = files.reduce((sum, file) => sum + file.size, 0);
    const empty = files.find((file) => file.size === 0);
    if (files.length > mostFiles)
      return `${files.length} files were sent, but at most ${mostFiles} are read at once.`;
    if (total > mostBytes)
      return `The ${files.length > 1 ? "files are" : "file is"} ${megabytes(total)} MB, more than the ${megabytes(mostBytes)} MB allowed; zip the folder: DICOM files often become about ${megabytes(0.22 * total)} MB.`;
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
    const files = chosen();
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
    request.upload.onload = () => busy(chosen().length > 1 ? "Reading the scans …" : "Reading the scan …", 1);
    request.onerror = () => fail("The server cannot be reached; try again.");
    request.onload = () => {
      const answer = request.response ?? {};
      if (answer.id) location.assign(form.dataset.results.replace("ID", answer.id));
      else fail(answer.error ?? "The server gave no answer; try again.");
    };
    busy("Sending …");
    request.send(new FormData(form));
  };

  for (const each of inputs) each.addEventListener("change", look);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const sentence = complaint(chosen());
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
