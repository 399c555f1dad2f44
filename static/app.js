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

  const label = (files) => (files.length ? `Analyze ${files.length} file${files.length > 1 ? "s" : ""}` : "Analyze");

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
    button.textContent = label(files);
    const total = files.reduce((sum, file) => sum + file.size, 0);
    document.getElementById("chosen").textContent = files.length ? `${files.length} file${files.length > 1 ? "s" : ""}, ${total < 2 ** 20 ? `${Math.ceil(total / 1024)} kB` : `${megabytes(total)} MB`}` : "";
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
  for (const example of document.querySelectorAll(".example"))
    example.addEventListener("click", async (event) => {
      event.preventDefault();
      const blob = await (await fetch(example.href)).blob();
      const files = new DataTransfer();
      files.items.add(new File([blob], example.href.split("/").pop()));
      for (const each of inputs) each.value = "";
      input.files = files.files;
      look();
      form.requestSubmit();
    });
  addEventListener("pageshow", () => busy("")); // coming back with the browser's button
}

// The viewer: one large picture, moved through the slices of a series. Each bar of a strip is a link
// to its slice and holds what is shown of it; a single answer has no strip, only the link below it.
const viewer = document.getElementById("viewer");
if (viewer) {
  const [stack, layers, about] = [".stack", ".layers", ".about a"].map((found) => viewer.querySelector(found));
  const control = (name) => viewer.querySelector(`[name=${name}]`);
  const strips = [...document.querySelectorAll(".strip")].map((strip) => [...strip.querySelectorAll("a")]);
  const urlOf = (link) => link.getAttribute("href");
  const only = about.cloneNode(true);
  const place = new Map(strips.flatMap((links) => links.map((link, at) => [urlOf(link), { links, at }])));
  const start = place.get(urlOf(about)) ?? { links: [only], at: 0 };
  const view = { ...start, overlay: viewer.dataset.overlay === "on", zoom: 1, x: 0, y: 0 };
  const kept = new Map(); // the pictures of the slices last seen and of their neighbours
  const alone = viewer.dataset.count === "1" && !strips.length;

  const picture = (kind, src, alt) => Object.assign(new Image(), { className: kind, src, alt });

  const picturesOf = (link) => {
    const url = urlOf(link);
    if (!kept.has(url)) {
      const evidence = link.dataset.evidence;
      kept.set(url, {
        scan: picture("scan", `${url}/scan.png`, "The scan as it was read"),
        heat: evidence && picture("heat", `${url}/heat.png`, `Heat: where the network saw evidence for ${evidence}`),
      });
    }
    if (kept.size > 64) kept.delete(kept.keys().next().value);
    return kept.get(url);
  };

  // Heat is for what the answer says: where that is "no tumor", only if the reader asks for it.
  const hasHeat = (link) => view.overlay && link.dataset.evidence && (link.getAttribute("class") !== "no_tumor" || alone || control("asked")?.checked);

  const draw = () => {
    const link = view.links[view.at];
    const { scan, heat } = picturesOf(link);
    const wanted = hasHeat(link) ? [scan, heat] : [scan];
    if (wanted.length !== layers.children.length || wanted.some((image, n) => image !== layers.children[n])) layers.replaceChildren(...wanted);
    scan.style.filter = `brightness(${control("brightness").value}%) contrast(${control("contrast").value}%)`;
    if (heat) heat.style.opacity = control("strength").value / 100;
    layers.style.transform = `translate(${view.x}px, ${view.y}px) scale(${view.zoom})`;
    stack.style.touchAction = view.zoom > 1 ? "none" : "pan-y";
    control("overlay").setAttribute("aria-pressed", view.overlay);
    viewer.dataset.overlay = view.overlay ? "on" : "off";
  };

  const mark = (link) => {
    document.querySelector(".strip [aria-current]")?.removeAttribute("aria-current");
    link.setAttribute("aria-current", "true");
    about.textContent = link.querySelector("title").textContent;
    about.href = urlOf(link);
    about.className = link.getAttribute("class");
    viewer.querySelector(".evidence").textContent = link.dataset.evidence ?? "a tumor";
    for (const series of document.querySelectorAll(".series a")) series.setAttribute("aria-current", place.get(urlOf(series))?.links === view.links);
  };

  const count = () => {
    const [slider, total] = [control("slice"), view.links.length];
    Object.assign(viewer.dataset, { slice: view.at, count: total });
    if (!slider) return;
    slider.max = total;
    slider.value = view.at + 1;
    slider.setAttribute("aria-valuetext", about.textContent);
    viewer.querySelector("output").textContent = `${view.at + 1} of ${total}`;
  };

  const show = (at, links = view.links) => {
    view.links = links;
    view.at = Math.max(0, Math.min(links.length - 1, at));
    if (!alone) mark(links[view.at]);
    count();
    draw();
    for (const near of [view.at + 1, view.at - 1, view.at + 2]) if (links[near]) picturesOf(links[near]);
  };

  const step = (by) => show(view.at + by);

  const zoom = (by) => {
    view.zoom = Math.max(1, Math.min(16, view.zoom * by));
    pan(0, 0);
  };

  const pan = (x, y) => {
    const most = (stack.clientWidth * (view.zoom - 1)) / 2;
    const within = (value) => Math.max(-most, Math.min(most, value));
    Object.assign(view, { x: within(view.x + x), y: within(view.y + y) });
    draw();
  };

  const reset = () => {
    Object.assign(view, { zoom: 1, x: 0, y: 0 });
    for (const name of ["brightness", "contrast", "strength"]) control(name).value = 100;
    draw();
  };

  const toggle = () => {
    view.overlay = !view.overlay;
    draw();
  };

  const play = () => {
    clearInterval(view.timer);
    view.timer = view.timer ? 0 : setInterval(() => show((view.at + 1) % view.links.length), 100);
    control("play")?.setAttribute("aria-pressed", Boolean(view.timer));
  };

  const shade = (name, by) => {
    control(name).value = Number(control(name).value) + by;
    draw();
  };

  // Keys: those that would scroll the page only while the viewer has the focus or the mouse.
  const keys = {
    ArrowRight: () => step(1), ArrowDown: () => step(1), ArrowLeft: () => step(-1), ArrowUp: () => step(-1),
    PageDown: () => step(10), PageUp: () => step(-10), Home: () => show(0), End: () => show(Infinity),
    h: toggle, "+": () => zoom(1.25), "=": () => zoom(1.25), "-": () => zoom(0.8), " ": play,
  };
  const ownKeys = "input, select, textarea, summary, button, a";
  document.addEventListener("keydown", (event) => {
    const act = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    const here = viewer.contains(event.target) || (event.target === document.body && viewer.matches(":hover"));
    const moves = event.key.length > 1 || event.key === " ";
    if (!act || !here || event.ctrlKey || event.metaKey || event.altKey) return;
    if (moves && (alone || event.target.matches(ownKeys))) return;
    event.preventDefault();
    act();
  });

  const turn = (pixels) => { // a notch of a wheel is a slice; a touchpad sends many small turns
    view.turned = (view.turned ?? 0) + pixels;
    if (Math.abs(view.turned) < 40) return;
    step(Math.sign(view.turned));
    view.turned = 0;
  };
  stack.addEventListener("wheel", (event) => {
    if (event.ctrlKey) zoom(event.deltaY < 0 ? 1.1 : 1 / 1.1); // a pinch on a touchpad
    else if (view.links.length > 1) turn(event.deltaMode ? 40 * event.deltaY : event.deltaY);
    else return;
    event.preventDefault();
  }, { passive: false });

  // One finger or the left button pans, two fingers pinch, the right button sets the grey levels.
  const fingers = new Map();
  const spread = () => {
    const [one, two] = [...fingers.values()];
    return Math.hypot(one.x - two.x, one.y - two.y);
  };
  stack.addEventListener("pointerdown", (event) => {
    stack.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, { x: event.clientX, y: event.clientY });
  });
  stack.addEventListener("pointermove", (event) => {
    const last = fingers.get(event.pointerId);
    if (!last) return;
    const before = fingers.size === 2 ? spread() : 0;
    const [across, down] = [event.clientX - last.x, event.clientY - last.y];
    Object.assign(last, { x: event.clientX, y: event.clientY });
    if (before) zoom(spread() / before);
    else if (event.buttons & 2) {
      shade("contrast", across / 2);
      shade("brightness", -down / 2);
    } else pan(across, down);
  });
  for (const kind of ["pointerup", "pointercancel"]) stack.addEventListener(kind, (event) => fingers.delete(event.pointerId));
  stack.addEventListener("contextmenu", (event) => event.preventDefault());
  stack.addEventListener("dragstart", (event) => event.preventDefault());
  stack.addEventListener("dblclick", reset);

  for (const [name, act] of Object.entries({ play, overlay: toggle, reset, larger: () => zoom(1.25), smaller: () => zoom(0.8) }))
    control(name)?.addEventListener("click", act);
  control("slice")?.addEventListener("input", (event) => show(event.target.value - 1));
  for (const name of ["strength", "brightness", "contrast", "asked"]) control(name)?.addEventListener("input", draw);

  // Links to a slice show it here: those of the strips, the series and the slices that carry the answer.
  document.addEventListener("click", (event) => {
    const link = event.target.closest(".strip a, .series a, .trio a");
    const found = link && place.get(urlOf(link));
    if (!found || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    show(found.at, found.links);
    viewer.scrollIntoView({ block: "nearest" });
  });

  viewer.tabIndex = 0;
  viewer.querySelector(".controls").hidden = false;
  kept.set(urlOf(about), { scan: layers.querySelector(".scan"), heat: layers.querySelector(".heat") ?? picturesOf(view.links[view.at]).heat });
  show(view.at);
}

// While a study is read: its counts, and how long it will take at the speed seen so far.
const running = document.getElementById("running");
if (running) {
  const began = { time: Date.now() };
  const left = (progress) => {
    began.progress ??= progress;
    const seconds = ((Date.now() - began.time) / 1000) * ((1 - progress) / (progress - began.progress));
    if (!Number.isFinite(seconds)) return "";
    return seconds > 90 ? `; about ${Math.round(seconds / 60)} minutes left` : `; about ${Math.ceil(seconds / 5) * 5} seconds left`;
  };
  const update = async () => {
    const response = await fetch(running.dataset.json).catch(() => null);
    const result = response?.ok ? await response.json() : null;
    if (response && result?.status !== "running") return location.reload();
    if (result) {
      running.querySelector("progress").value = result.progress;
      running.querySelector("[role=status]").textContent = `${result.scans.length} of ${result.total}${left(result.progress)}`;
      for (const each of document.querySelectorAll("[data-verdict]")) each.textContent = result.scans.filter((scan) => scan.verdict === each.dataset.verdict).length;
    }
    return setTimeout(update, 1000);
  };
  update();
}

for (const time of document.querySelectorAll("time")) time.textContent = new Date(time.dateTime).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });

// The last uploads of this browser, kept by it alone, until they are removed or too old.
const uploads = {
  read: () => JSON.parse(localStorage.getItem("uploads") ?? "[]"),
  write: (list) => localStorage.setItem("uploads", JSON.stringify(list.slice(0, 10))),
  forget: (url) => uploads.write(uploads.read().filter((upload) => upload.url !== url)),
};
const result = document.querySelector("[data-result]");
if (result) {
  const url = result.dataset.result;
  const before = uploads.read().find((upload) => upload.url === url);
  const title = document.querySelector("h1").textContent;
  uploads.write([{ url, title, time: before?.time ?? Date.now() }, ...uploads.read().filter((upload) => upload.url !== url)]);
  result.querySelector("form").addEventListener("submit", () => uploads.forget(url));
}
const last = document.getElementById("last");
if (last) {
  const young = uploads.read().filter((upload) => Date.now() - upload.time < last.dataset.hours * 3600000);
  const entry = ({ url, title, time }) => {
    const item = document.createElement("li");
    const link = Object.assign(document.createElement("a"), { href: url, textContent: title });
    item.append(link, ` ${new Date(time).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" })}`);
    return item;
  };
  uploads.write(young);
  last.hidden = !young.length;
  last.querySelector("ul").replaceChildren(...young.map(entry));
  last.querySelector("button").addEventListener("click", () => {
    uploads.write([]);
    last.hidden = true;
  });
}
