// The page of `sdtrain serve`: it asks its own server for pictures, and shows texts as texts only.

const $ = id => document.getElementById(id);
let about = {};

// Asking

async function asked(what, options) {
  let answer;
  try {
    answer = await fetch(what, options);
  } catch {
    throw new Error("the server does not answer; is `sdtrain serve` still running?");
  }
  if (!answer.ok) throw new Error(await answer.text());
  return answer;
}

async function make(settings, body) {
  const answer = await asked("make?" + new URLSearchParams(settings), {method: "POST", body});
  return {picture: await answer.blob(), told: JSON.parse(answer.headers.get("made"))};
}

// One request is under way; of those that come meanwhile the newest follows it.
let busy = false;
let next = null;

async function take(work) {
  next = work;
  if (busy) return;
  busy = true;
  const clock = startClock();
  while (next) {
    const now = next;
    next = null;
    $("wrong").textContent = "";
    try {
      await now();
    } catch (error) {
      $("wrong").textContent = error.message;
    }
  }
  clearInterval(clock);
  $("working").hidden = true;
  busy = false;
}

function startClock() {
  const began = performance.now();
  return setInterval(() => {
    const seconds = Math.floor((performance.now() - began) / 1000);
    $("working").hidden = seconds < 1;
    $("clock").textContent = `working, ${seconds} s`;
  }, 250);
}

// Showing

function place(image, blob) {
  URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(blob);
  return image.decode();
}

function show({picture, told}, name) {
  const [width, height] = told.size;
  const stage = $("stage");
  stage.style.setProperty("--w", width);
  stage.style.setProperty("--h", height);
  stage.style.setProperty("--dpr", devicePixelRatio);
  stage.classList.toggle("coarse", about.does === "latents" && width < 256);
  $("shown").hidden = false;
  $("download").download = name;
  $("download").href = $("after").src;
}

const pixels = ([width, height]) => `${width} x ${height}`;

// The words of a terminal that write the same picture.
function tellCommand(words) {
  $("command").hidden = false;
  $("command").querySelector("code").textContent = words;
}

// Pictures

function enlarge(file) {
  if (!file) return;
  take(async () => {
    if (file.size > about.max_bytes) throw new Error(`${file.name} is larger than an upload may be (--max-upload-mb)`);
    const settings = $("factor").value ? {factor: $("factor").value} : {};
    const made = await make(settings, file).catch(error => { throw new Error(`${file.name}: ${error.message}`); });
    await place($("before"), file).catch(async () => place($("before"), (await make({before: 1}, file)).picture));
    await place($("after"), made.picture);
    const {before, size, ms} = made.told;
    show(made, file.name.replace(/\.[^.]*$/, "") + "_enlarged.png");
    split(50);
    tellCommand(`${about.command}${settings.factor ? ` --factor ${settings.factor}` : ""} --out large`);
    $("told").textContent = `${file.name}: ${pixels(before)} px to ${pixels(size)} px in ${ms} ms`;
  });
}

function split(percent) {
  $("split").value = percent;
  $("stage").style.setProperty("--split", `${percent}%`);
  $("split").setAttribute("aria-valuetext", `${percent} % before`);
}

function preparePictures() {
  let last = null;
  const drop = $("drop");
  const taken = file => enlarge(last = file);
  $("file").addEventListener("change", () => taken($("file").files[0]));
  $("split").addEventListener("input", () => split($("split").value));
  $("factor").addEventListener("change", () => enlarge(last));
  for (const name of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(name, event => {
      event.preventDefault();
      drop.classList.toggle("over", name === "dragover");
      if (name === "drop") taken(event.dataTransfer.files[0]);
    });
  }
  const faces = about.factors ? `Square, aligned faces of at most ${about.resolution} px. ` : "";
  $("limits").textContent = `${faces}Up to ${Math.round(about.max_bytes / 2 ** 20)} MB; nothing is kept.`;
  $("factor-row").hidden = !about.factors;
  if (about.factors) [$("factor").min, $("factor").max] = about.factors;
}

// Latents

function latentSettings() {
  const settings = {seed: $("seed").value, latent: $("latent").value};
  if ($("share").value > 0) Object.assign(settings, {to: $("to").value, share: $("share").value});
  if (about.truncation && $("truncation").value != 1) settings.truncation = $("truncation").value;
  if (about.classes.length) settings.class = $("class").value;
  return settings;
}

function commandOf({seed, latent, to, share, truncation, class: label}) {
  const which = share ? `${latent},${to} --interpolate 100` : latent;
  const more = (truncation ? ` --truncation ${truncation}` : "") + (label ? ` --class ${label}` : "");
  const frame = share ? `   (interpolation/${String(Math.round(share * 100)).padStart(4, "0")}.png)` : "";
  return `${about.command} --seed ${seed} --indices ${which}${more} --out images${frame}`;
}

function draw() {
  $("share-said").textContent = `${Math.round($("share").value * 100)} %`;
  $("truncation-said").textContent = $("truncation").value;
  if (!$("asking").reportValidity()) return;
  take(async () => {
    const settings = latentSettings();
    const made = await make(settings);
    await place($("after"), made.picture);
    show(made, `seed${settings.seed}_latent${settings.latent}.png`);
    $("told").textContent = `${pixels(made.told.size)} px in ${made.told.ms} ms`;
    tellCommand(commandOf(settings));
  });
}

function prepareLatents() {
  for (const id of ["seed", "latent", "to"]) $(id).max = about.most;
  $("seed").value = about.seed;
  $("truncation-row").hidden = !about.truncation;
  $("class-row").hidden = !about.classes.length;
  about.classes.forEach((name, number) => $("class").add(new Option(name, number)));
  $("stage").classList.add("single");
  $("after").alt = "image of these latents";
  $("asking").addEventListener("input", draw);
  $("new").addEventListener("click", () => {
    for (const id of ["latent", "to"]) $(id).value = crypto.getRandomValues(new Uint32Array(1))[0] % 1000000;
    $("share").value = 0;
    draw();
  });
  draw();
}

try {
  about = await (await asked("about")).json();
  $("title").textContent = about.title;
  document.title = `${about.title} - sdtrain`;
  $(about.does).hidden = false;
  $("main").classList.add(about.does);
  $("actual").addEventListener("change", () => $("stage").classList.toggle("actual", $("actual").checked));
  $("asking").addEventListener("submit", event => event.preventDefault());
  ({pictures: preparePictures, latents: prepareLatents})[about.does]();
} catch (error) {
  $("wrong").textContent = error.message;
}
