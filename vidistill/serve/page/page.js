// The page: inputs go out, frames come in and are drawn. The messages are described in serve/protocol.py.

const HEADER_BYTES = 20, VERSION = 2, FRAME = 1, SOUND = 2, PICTURE = 1, INPUT = 2, RAW = 0;
const FIRST = 1, RECORDING = 4;
const WINDOW_MS = 2000; // frames a second are counted over this time
const PAD = { // an arrow -> all keys like it, where its button stands, its sign
  ArrowLeft: { codes: ["ArrowLeft", "KeyA"], area: "left", sign: "←" },
  ArrowRight: { codes: ["ArrowRight", "KeyD"], area: "right", sign: "→" },
  ArrowUp: { codes: ["ArrowUp", "KeyW"], area: "up", sign: "↑" },
  ArrowDown: { codes: ["ArrowDown", "KeyS"], area: "down", sign: "↓" },
};
const KEYS = { // action -> its keys, where its button stands, what the button says
  turn_left: { ...PAD.ArrowLeft, text: "turn left" },
  turn_right: { ...PAD.ArrowRight, text: "turn right" },
  forward: { ...PAD.ArrowUp, text: "forward" },
  backward: { ...PAD.ArrowDown, text: "backward" },
  strafe_left: { codes: ["KeyQ"], sign: "⇠", text: "Q  step left" },
  strafe_right: { codes: ["KeyE"], sign: "⇢", text: "E  step right" },
};

const $ = (id) => document.getElementById(id);
const canvas = $("canvas"), paper = canvas.getContext("2d", { willReadFrequently: true });

let socket = null, world = null, retries = 0, ended = false;
let start = "", picture = null; // chosen start image; preview of one's own
let userPaused = false, pausedAtServer = false, begun = false;
let inputId = 0, recording = false, recordedFrames = 0;
const held = new Map(); // what holds keys down (a key code, a finger) -> these keys
const keysOf = new Map(); // key code -> the key that it is, or that it is like, in a list
const chords = new Map(); // action -> keys that hold it, all of them together
const pending = new Map(); // input id -> when it was sent
const latencies = [], drawn = []; // the last few, ms
let newest = null, decoding = 0; // frame waiting to be drawn

// --- the connection ---

function connect() {
  const url = new URL("stream", location.href);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  ended = false;
  socket = new WebSocket(url);
  socket.binaryType = "arraybuffer";
  socket.onmessage = ({ data }) => (typeof data === "string" ? NOTES[JSON.parse(data).type]?.(JSON.parse(data)) : receive(data));
  socket.onclose = ({ code }) => {
    release();
    showRecord("off");
    world = null;
    document.body.classList.add("off");
    if (ended) return;
    if (code === 1009) toast("The server ended the connection: a message was too large.");
    retries += 1;
    const seconds = Math.min(1 + retries, 8);
    cover("Connection lost", `Trying again in ${seconds} s. Is the server still running?`, { spin: true });
    setTimeout(() => { if (!ended) connect(); }, 1000 * seconds);
  };
}

function say(message) {
  if (socket?.readyState === WebSocket.OPEN && world) socket.send(JSON.stringify(message));
}

// Sends inputs by name, as the model's session takes them, and measures how long they take to show.
function setInputs(inputs) {
  if (!world || pausedAtServer) return;
  pending.set(++inputId, performance.now());
  say({ type: "set", id: inputId, inputs });
}

const TAGLINES = {
  hold: "A video model generates every frame from the keys you hold. There is no game engine behind it.",
  sound: "A video model generates every frame from the audio it gets: speak, and it speaks.",
  text: "A video model generates every frame from the last prompt you set.",
};

const NOTES = {
  hello(said) {
    world = said;
    document.body.classList.remove("off");
    retries = inputId = 0;
    userPaused = pausedAtServer = begun = false;
    decoding = 0;
    pending.clear();
    latencies.length = 0;
    $("name").textContent = said.name;
    document.title = `${said.name} · vidistill`;
    const kinds = Object.values(said.takes).map((input) => input.kind);
    $("tagline").textContent = said.about || (TAGLINES[["sound", "hold", "text"].find((kind) => kinds.includes(kind))] ?? "");
    canvas.width = said.width;
    canvas.height = said.height;
    canvas.style.aspectRatio = `${said.width} / ${said.height}`;
    $("seed").max = said.max_seed;
    $("fpsof").textContent = `of ${said.fps.toFixed(1)}`;
    $("nfeof").textContent = `for ${said.frames_per_chunk} frames`;
    showStats(said);
    start = said.starts?.[0] ?? "";
    $("seed").value = 0;
    picture = null;
    $("mapbox").hidden = !said.has_map;
    $("history").hidden = !said.has_history;
    buildInputs();
    buildStarts();
    updatePause();
  },
  stats: showStats,
  map: drawMap,
  error: ({ message }) => toast(message),
  bye({ reason, message }) {
    ended = true;
    const title = { full: "All seats are taken", idle: "Still there?", failed: "The stream failed" }[reason] ?? "Disconnected";
    cover(title, message, { button: reason === "idle" ? "Continue" : "Try again", act: connect });
  },
  picture() {
    start = "upload";
    buildStarts();
    restart();
  },
  record({ state, message, url, seconds }) {
    showRecord(state);
    if (message) toast(message);
    if (state !== "ready") return;
    const link = Object.assign(document.createElement("a"), { href: url, download: "" });
    link.textContent = `Download ${seconds} s as mp4`;
    const item = document.createElement("li");
    item.append(link);
    $("videos").prepend(item);
    toast("The recording is ready: see the link beside the video.", true);
  },
};

// --- frames ---

function receive(data) {
  const view = new DataView(data);
  if (data.byteLength < HEADER_BYTES || view.getUint8(0) !== VERSION) return;
  if (view.getUint8(1) === SOUND) play(new Int16Array(data, HEADER_BYTES));
  if (view.getUint8(1) !== FRAME) return;
  const [encoding, flags] = [view.getUint8(2), view.getUint8(3)];
  const [sequence, index, chunk, input] = [4, 8, 12, 16].map((at) => view.getUint32(at, true));
  const frame = { sequence, index, chunk, input, first: flags & FIRST, recording: flags & RECORDING };
  const body = new Uint8Array(data, HEADER_BYTES);
  if (encoding === RAW) return waitToDraw({ ...frame, image: unpack(body) });
  createImageBitmap(new Blob([body], { type: "image/jpeg" })).then(
    (image) => { if (sequence > decoding) { decoding = sequence; waitToDraw({ ...frame, image }); } },
    () => toast("A frame arrived damaged."),
  );
}

function unpack(rgb) {
  const image = new ImageData(canvas.width, canvas.height);
  for (let i = 0, j = 0; j + 2 < rgb.length; i += 4, j += 3) {
    image.data[i] = rgb[j];
    image.data[i + 1] = rgb[j + 1];
    image.data[i + 2] = rgb[j + 2];
    image.data[i + 3] = 255;
  }
  return image;
}

function waitToDraw(frame) {
  if (!newest) requestAnimationFrame(draw);
  newest = frame; // a newer frame replaces one that was not drawn in time
}

function draw() {
  const frame = newest, now = performance.now();
  newest = null;
  if (frame.image instanceof ImageData) paper.putImageData(frame.image, 0, 0);
  else paper.drawImage(frame.image, 0, 0, canvas.width, canvas.height);
  say({ type: "seen", sequence: frame.sequence });
  begun = true;
  if (!$("overlay").hidden) updatePause();
  drawn.push(now);
  if (pending.has(frame.input)) latencies.push(now - pending.get(frame.input));
  for (const id of pending.keys()) if (id <= frame.input) pending.delete(id);
  latencies.splice(0, latencies.length - 9);
  if (frame.recording && world) $("recordtime").textContent = `${(++recordedFrames / world.fps).toFixed(1)} s`;
  canvas.dispatchEvent(new CustomEvent("frame", { detail: frame }));
}

setInterval(() => {
  const now = performance.now();
  while (drawn.length && drawn[0] < now - WINDOW_MS) drawn.shift();
  const span = drawn.length > 1 ? drawn.at(-1) - drawn[0] : 0;
  $("fps").textContent = span ? (((drawn.length - 1) * 1000) / span).toFixed(1) : "–";
  const median = [...latencies].sort((a, b) => a - b)[latencies.length >> 1];
  $("latency").textContent = median ? Math.round(median) : "–";
  $("latencyunit").textContent = median ? "ms" : "";
}, 400);

function showStats({ memory_bytes: bytes, nfe_per_chunk: nfe, lips_ms: lips }) {
  if (lips) $("lips").textContent = lips;
  const [value, unit] = bytes < 1e6 ? [bytes / 1e3, "kB"] : bytes < 1e9 ? [bytes / 1e6, "MB"] : [bytes / 1e9, "GB"];
  $("memory").textContent = value.toFixed(value < 10 ? 1 : 0);
  $("memoryunit").textContent = unit;
  $("nfe").textContent = Number(nfe.toFixed(1));
}

// --- keys and fingers ---

function hold(source, keys, down) {
  if (down === (held.get(source) === keys)) return;
  if (down) held.set(source, keys);
  else held.delete(source);
  sendKeys();
}

function release() {
  if (!held.size) return;
  held.clear();
  sendKeys();
}

// Actions of which all keys are held; where keys together hold one of their own, it alone: up-right is not up beside right.
function heldActions() {
  const down = [...held.values()].flat();
  const whole = [...chords].filter(([, keys]) => keys.every((key) => down.includes(key)));
  const within = (few, many) => few.length < many.length && few.every((key) => many.includes(key));
  return whole.filter(([, keys]) => !whole.some(([, more]) => within(keys, more))).map(([action]) => action);
}

function sendKeys() {
  const down = new Set(heldActions());
  for (const button of document.querySelectorAll("[data-action]")) button.classList.toggle("held", down.has(button.dataset.action));
  const named = ([name, { kind }]) => kind === "hold" && [name, {}];
  const inputs = Object.fromEntries(Object.entries(world?.takes ?? {}).map(named).filter(Boolean));
  for (const action of down) inputs[holders.get(action)][action] = 1;
  setInputs(inputs);
}

// --- one card for each input that the model takes ---

const LABELS = { // input -> its title and a hint; others are titled by their names
  action: ["Move", "arrow keys or WASD"],
  prompt: ["Prompt", "what comes next"],
  audio: ["Talk", "your voice, a file, or words"],
};
const CONTROLS = { hold: buildButtons, numbers: buildSliders, text: buildText, sound: buildSound };
const holders = new Map(); // action -> the input it belongs to

function buildInputs() {
  keysOf.clear();
  chords.clear();
  holders.clear();
  $("lipsbox").hidden = true;
  $("inputs").replaceChildren();
  Object.entries(world.takes).forEach(([name, input], place) => {
    if (!CONTROLS[input.kind]) return; // of a newer server
    const card = $(input.kind).content.cloneNode(true).firstElementChild;
    const [label, hint] = LABELS[name] ?? [name.replaceAll("_", " "), ""];
    card.querySelector(".label").textContent = label;
    card.querySelector(".hint").textContent = hint;
    card.dataset.input = name;
    CONTROLS[input.kind](card, name, input, place);
    $("inputs").append(card);
  });
}

// What holds an action: the keys that the world names for it, all of them together, else the page's own, else a digit.
function keysFor(name, named = [], digit) {
  const own = KEYS[name] ?? { codes: [`Digit${digit}`], sign: digit, text: name.replaceAll("_", " ") };
  if (!named.length) return { ...own, keys: [own.codes] };
  const parts = named.map((key) => {
    const code = key === " " ? "Space" : /^[a-z]$/i.test(key) ? `Key${key.toUpperCase()}` : /^\d$/.test(key) ? `Digit${key}` : key;
    const arrow = Object.values(PAD).find(({ codes }) => codes.includes(code));
    return { codes: [code], sign: key === " " ? "Space" : key.toUpperCase(), ...arrow };
  });
  const one = parts.length === 1 ? parts[0] : { sign: parts.map(({ sign }) => sign).join(" ") };
  return { ...one, keys: parts.map(({ codes }) => codes), text: own.text };
}

function buildButtons(card, input, { names, keys = {} }) {
  names.forEach((name, i) => {
    const key = keysFor(name, keys[name], String((i + 1) % 10)), chord = key.keys.map(([first]) => first);
    for (const codes of key.keys) for (const code of codes) keysOf.set(code, codes.slice(0, 1));
    chords.set(name, chord);
    holders.set(name, input);
    const button = document.createElement("button");
    const label = document.createElement("small");
    label.textContent = key.text;
    button.append(key.sign, label);
    button.dataset.action = name;
    button.setAttribute("aria-label", key.text);
    if (key.area) button.style.gridArea = key.area;
    button.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      button.setPointerCapture(event.pointerId);
      hold(`finger ${event.pointerId}`, chord, true);
    });
    for (const kind of ["pointerup", "pointercancel", "lostpointercapture"]) {
      button.addEventListener(kind, (event) => hold(`finger ${event.pointerId}`, chord, false));
    }
    button.addEventListener("contextmenu", (event) => event.preventDefault());
    card.querySelector(key.area ? ".pad" : ".more").append(button);
  });
}

function buildSliders(card, input, { names, low = 0, high = 1, value = low }) {
  const values = Object.fromEntries(names.map((name) => [name, value]));
  for (const name of names) {
    const label = document.createElement("label");
    const slider = Object.assign(document.createElement("input"), { type: "range", min: low, max: high, step: "any", value });
    slider.addEventListener("input", () => {
      values[name] = Number(slider.value);
      setInputs({ [input]: values });
    });
    label.append(name.replaceAll("_", " "), slider);
    card.querySelector(".sliders").append(label);
  }
}

function buildText(card, input, { switches = [] }) {
  const text = card.querySelector(".text"), choice = card.querySelector(".switch");
  text.maxLength = world.max_text;
  text.setAttribute("aria-label", input);
  choice.replaceChildren(...switches.map((name) => new Option(name)));
  choice.hidden = !switches.length;
  card.querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (text.value.trim()) setInputs({ [input]: text.value.trim(), ...(switches.length && { switch: choice.value }) });
  });
}

const COMMANDS = { KeyR: restart, KeyN: newSeed, KeyV: toggleRecord, KeyP: togglePause, KeyH: returnToStart, KeyM: toggleHistory };

window.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select")) return;
  if (keysOf.has(event.code)) {
    event.preventDefault();
    if (!event.repeat) hold(event.code, keysOf.get(event.code), true);
  } else if (COMMANDS[event.code] && !event.repeat) {
    COMMANDS[event.code]();
  }
});
window.addEventListener("keyup", (event) => { if (held.has(event.code)) hold(event.code, held.get(event.code), false); });
window.addEventListener("blur", release);

// --- starting again ---

function restart() {
  const seed = Number($("seed").value);
  if (!Number.isInteger(seed) || seed < 0 || seed > world?.max_seed) return toast(`A seed is a whole number, 0 to ${world?.max_seed}.`);
  if (userPaused) togglePause();
  say({ type: "reset", seed, start });
}

function newSeed() {
  $("seed").value = Math.floor(Math.random() * 10000);
  restart();
}

function buildStarts() {
  $("starts").hidden = $("fromwhat").hidden = !world.starts;
  if (!world.starts) return;
  const tiles = world.starts.map((name) => tile(name, `starts/${encodeURIComponent(name)}.png`));
  if (picture) tiles.push(tile("upload", picture));
  const add = document.createElement("button");
  add.className = "add";
  add.title = "Start from a picture of your own (or drop it on the page)";
  add.innerHTML = "<span><b>+</b>your own</span>";
  add.addEventListener("click", () => $("file").click());
  $("starts").replaceChildren(...tiles, add);
}

function tile(name, source) {
  const button = document.createElement("button");
  button.setAttribute("aria-pressed", name === start);
  button.title = name === "upload" ? "Your picture" : name;
  button.append(Object.assign(new Image(), { src: source, alt: button.title }));
  button.addEventListener("click", () => {
    start = name;
    buildStarts();
    restart();
  });
  return button;
}

async function upload(file) {
  try { // cropped to the world's shape and made small here; the server checks it again
    const image = await createImageBitmap(file);
    const scale = Math.min(image.width / world.width, image.height / world.height);
    const [wide, high] = [world.width * scale, world.height * scale];
    const sheet = new OffscreenCanvas(4 * world.width, 4 * world.height);
    const pen = sheet.getContext("2d");
    pen.imageSmoothingQuality = "high";
    pen.drawImage(image, (image.width - wide) / 2, (image.height - high) / 2, wide, high, 0, 0, sheet.width, sheet.height);
    const png = await sheet.convertToBlob({ type: "image/png" });
    if (png.size >= world.max_picture) throw new Error("too large");
    if (picture) URL.revokeObjectURL(picture);
    picture = URL.createObjectURL(png);
    socket.send(new Blob([new Uint8Array([PICTURE]), png]));
  } catch (error) {
    toast(`${file.name} cannot be used as a picture (${error.message}).`);
  }
}

$("file").addEventListener("change", ({ target }) => {
  if (target.files[0]) upload(target.files[0]);
  target.value = "";
});
window.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
window.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dropping"); });
window.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  if (event.dataTransfer.files[0] && world?.starts) upload(event.dataTransfer.files[0]);
});

// --- where the stream is, and what it remembers ---

let showingHistory = true;

function drawMap({ here, path, stored, history, home }) {
  const sheet = $("map"), pen = sheet.getContext("2d");
  const places = [here, [0, 0, 0], ...path, ...stored];
  const [left, right] = [Math.min(...places.map((p) => p[0])) - 2, Math.max(...places.map((p) => p[0])) + 2];
  const [low, high] = [Math.min(...places.map((p) => p[1])) - 2, Math.max(...places.map((p) => p[1])) + 2];
  const scale = Math.min(sheet.width / (right - left), sheet.height / (high - low));
  const at = ([x, y]) => [(x - (left + right) / 2) * scale + sheet.width / 2, ((low + high) / 2 - y) * scale + sheet.height / 2];
  pen.clearRect(0, 0, sheet.width, sheet.height);
  const mark = (place, size, alpha) => { // a dot and where it looks
    const [x, y] = at(place);
    pen.globalAlpha = alpha;
    pen.beginPath();
    pen.arc(x, y, size, 0, 7);
    pen.fill();
    pen.beginPath();
    pen.moveTo(x, y);
    pen.lineTo(x + 3 * size * Math.cos(place[2]), y - 3 * size * Math.sin(place[2]));
    pen.stroke();
  };
  pen.lineWidth = 2;
  pen.strokeStyle = "#565e6b";
  pen.beginPath();
  for (const place of path) pen.lineTo(...at(place));
  pen.stroke();
  pen.fillStyle = pen.strokeStyle = "#ffb454";
  for (const place of stored) mark(place, 5, (history ? 1 : 0.3) * ({ 1: 1, 2: 0.6 }[place[3]] ?? 0.3));
  pen.fillStyle = pen.strokeStyle = "#98a1b0";
  mark([0, 0, 0], 4, 1);
  pen.fillStyle = pen.strokeStyle = "#e8eaee";
  mark(here, 8, 1);
  pen.globalAlpha = 1;
  showingHistory = history;
  $("history").setAttribute("aria-pressed", history);
  $("historylabel").textContent = history ? "Full history" : "Newest only";
  $("home").setAttribute("aria-pressed", home);
}

function returnToStart() {
  if (world?.has_map) say({ type: "return_to_start" });
}

function toggleHistory() {
  if (world?.has_history) say({ type: "show_history", on: !showingHistory });
}

// --- pausing, recording, telling ---

function updatePause() {
  const pause = userPaused || document.hidden;
  if (pause !== pausedAtServer) {
    release();
    say({ type: "pause", on: pause });
    pausedAtServer = pause;
    drawn.length = 0;
  }
  $("pauselabel").textContent = userPaused ? "Resume" : "Pause";
  $("pause").setAttribute("aria-pressed", userPaused);
  if (userPaused) cover("Paused", "The stream waits for you.", { button: "Resume", act: togglePause });
  else if (world && begun) $("overlay").hidden = true;
}

function togglePause() {
  if (!world) return;
  userPaused = !userPaused;
  updatePause();
}

function toggleRecord() {
  say({ type: "record", on: !recording });
}

function showRecord(state) {
  recording = state === "on";
  recordedFrames = 0;
  $("recording").hidden = !recording;
  $("recordtime").textContent = "0.0 s";
  $("record").setAttribute("aria-pressed", recording);
  $("record").disabled = state === "saving";
  $("recordlabel").textContent = { on: "Stop", saving: "Saving" }[state] ?? "Record";
}

function cover(title, text, { button = "", act = null, spin = false } = {}) {
  $("overtitle").textContent = title;
  $("overtext").textContent = text;
  $("spinner").hidden = !spin;
  $("overbutton").hidden = !button;
  $("overbutton").textContent = button;
  $("overbutton").onclick = () => {
    if (act === connect) cover("Starting", "Waiting for the first frame.", { spin: true });
    act();
  };
  $("overlay").hidden = false;
}

let toastTimer = 0;
function toast(message, good = false) {
  clearTimeout(toastTimer);
  $("toast").textContent = message;
  $("toast").classList.toggle("good", good);
  $("toast").hidden = false;
  toastTimer = setTimeout(() => { $("toast").hidden = true; }, 6000);
}

document.addEventListener("visibilitychange", updatePause);
$("restart").addEventListener("click", restart);
$("dice").addEventListener("click", newSeed);
$("record").addEventListener("click", toggleRecord);
$("pause").addEventListener("click", togglePause);
$("home").addEventListener("click", returnToStart);
$("history").addEventListener("click", toggleHistory);
$("seed").addEventListener("keydown", (event) => {
  if (event.key === "Enter") { event.target.blur(); restart(); }
});
document.addEventListener("click", (event) => event.target.closest?.("button")?.blur()); // keys belong to the stream

// --- sound: it goes to the server as 16-bit samples, and comes back with the frames it belongs to ---

let speaker = null, playhead = 0, microphone = null, heard = 0, rate = 16000;

function buildSound(card, input, described, place) {
  const one = (name) => card.querySelector(`.${name}`);
  rate = described.rate;
  $("lipsbox").hidden = false;
  one("speak").hidden = !world.speaks;
  one("text").maxLength = world.max_text;
  one("mic").onclick = () =>
    toggleMicrophone(one("mic"), place).catch((error) => toast(`The microphone cannot be used: ${error.message}`));
  one("file").onchange = ({ target }) =>
    sendFile(target.files[0], place).catch(() => toast("This file contains no audio that can be read."));
  one("interrupt").onclick = () => { playhead = 0; say({ type: "clear_audio" }); };
  one("speak").onsubmit = (event) => {
    event.preventDefault();
    wake();
    if (one("text").value.trim()) say({ type: "say", text: one("text").value.trim() });
    one("text").value = "";
  };
}

function play(samples) {
  heard += samples.length;
  document.body.dataset.heard = heard;
  if (!speaker || speaker.state !== "running") return; // browsers play nothing before a first touch of the page
  const buffer = speaker.createBuffer(1, samples.length, rate);
  buffer.getChannelData(0).set(Float32Array.from(samples, (v) => v / 32768));
  const source = speaker.createBufferSource();
  source.buffer = buffer;
  source.connect(speaker.destination);
  const now = speaker.currentTime;
  if (playhead < now || playhead > now + 0.4) playhead = now + 0.03; // late or far ahead: start again with the video
  source.start(playhead);
  playhead += buffer.duration;
}

function wake() {
  speaker ??= new AudioContext({ sampleRate: rate });
  return speaker.resume();
}

function sendSound(floats, place) {
  if (pausedAtServer) return; // nobody listens, and it would come late
  const message = new Uint8Array(2 + 2 * floats.length), view = new DataView(message.buffer);
  message[0] = INPUT;
  message[1] = place;
  floats.forEach((v, i) => view.setInt16(2 + 2 * i, Math.max(-1, Math.min(1, v)) * 32767, true));
  if (socket?.readyState === WebSocket.OPEN) socket.send(message);
}

async function toggleMicrophone(button, place) {
  await wake();
  if (microphone) {
    microphone.stream.getTracks().forEach((track) => track.stop());
    microphone.node.disconnect();
    microphone = null;
  } else {
    const stream = await navigator.mediaDevices.getUserMedia({ audio: { echoCancellation: true, noiseSuppression: true } });
    const node = speaker.createScriptProcessor(1024, 1, 1);
    node.onaudioprocess = (event) => sendSound(event.inputBuffer.getChannelData(0), place);
    speaker.createMediaStreamSource(stream).connect(node);
    node.connect(speaker.destination); // it runs only when connected; it puts out silence
    microphone = { stream, node };
  }
  button.setAttribute("aria-pressed", String(Boolean(microphone)));
}

async function sendFile(file, place) {
  await wake();
  const sound = (await speaker.decodeAudioData(await file.arrayBuffer())).getChannelData(0);
  for (let at = 0; at < sound.length; at += 16000) sendSound(sound.subarray(at, at + 16000), place);
}

connect();
