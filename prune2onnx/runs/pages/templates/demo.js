// The page of `prune2onnx demo`: a picture is converted to the model's input as in training,
// onnxruntime-web runs the model, and its scores become bars. #setup describes model and data.
//
// A classic script, not a module: browsers load no modules from file://, and the page has to say
// that. Names come from files and folders that are not trusted: they are set as text, not as HTML.

"use strict";

(() => {
  const byId = (id) => document.getElementById(id);
  const setup = JSON.parse(byId("setup").textContent);
  const [channels, height, width] = setup.shape;
  const board = byId("board"); // null where images are chosen
  const block = Math.max(1, Math.round(336 / Math.max(height, width))); // board pixels per pixel
  const TIMING_MS = 25; // inferences are repeated for this long: browsers' clocks are coarse
  const LARGEST = 4096; // a longer side is scaled down before its pixels are read
  const SORTED = 20; // with more classes, they are sorted by score

  // ---- Pixels -----------------------------------------------------------------------------------

  // A picture is {width, height, planes}: each plane holds 0 ... 255, row by row.

  function picture(context, planes) {
    const { width, height } = context.canvas;
    const { data } = context.getImageData(0, 0, width, height);
    const made = Array.from({ length: planes }, () => new Uint8Array(width * height));
    for (let i = 0; i < width * height; i++) {
      const [r, g, b] = [data[4 * i], data[4 * i + 1], data[4 * i + 2]];
      if (planes === 3) [made[0][i], made[1][i], made[2][i]] = [r, g, b];
      // Pillow's conversion to grey, in integers
      else made[0][i] = (19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16;
    }
    return { width, height, planes: made };
  }

  // The model's picture: each pixel is the mean of a square with side `step`, the first one at
  // (x0, y0); pixels beyond the edge have the value `outside`. A square of one value gives that
  // value exactly.
  function sampled(source, x0, y0, step, outside = 0) {
    const planes = source.planes.map((plane) => {
      const made = new Float64Array(width * height);
      for (let y = 0; y < height; y++) {
        for (let x = 0; x < width; x++) {
          made[y * width + x] = mean(plane, source, x0 + x * step, y0 + y * step, step, outside);
        }
      }
      return made;
    });
    return { width, height, planes };
  }

  function mean(plane, size, left, top, step, outside) {
    let sum = 0;
    let area = 0;
    const right = Math.min(left + step, size.width);
    const bottom = Math.min(top + step, size.height);
    for (let y = Math.max(0, Math.floor(top)); y < bottom; y++) {
      const tall = Math.min(y + 1, bottom) - Math.max(y, top);
      for (let x = Math.max(0, Math.floor(left)); x < right; x++) {
        const part = tall * (Math.min(x + 1, right) - Math.max(x, left));
        sum += part * plane[y * size.width + x];
        area += part;
      }
    }
    return (sum + Math.max(0, step * step - area) * outside) / (step * step);
  }

  // A drawing, scaled and centred like the pictures of the data source.
  function fitted(drawing, { box, by }, outside) {
    const plane = drawing.planes[0].map((value) => Math.abs(value - outside));
    const inked = plane.some((value) => value > 127) ? 127 : 0;
    let [left, top, right, bottom] = [Infinity, Infinity, -1, -1];
    let [mass, massX, massY] = [0, 0, 0];
    plane.forEach((value, i) => {
      const x = i % drawing.width;
      const y = Math.floor(i / drawing.width);
      if (value > inked) {
        [left, right] = [Math.min(left, x), Math.max(right, x + 1)];
        [top, bottom] = [Math.min(top, y), Math.max(bottom, y + 1)];
      }
      mass += value;
      massX += value * (x + 0.5);
      massY += value * (y + 0.5);
    });
    if (right < 0) return sampled(drawing, 0, 0, block, outside);
    const step = Math.max(right - left, bottom - top) / box;
    const [x, y] =
      by === "mass" ? [massX / mass, massY / mass] : [(left + right) / 2, (top + bottom) / 2];
    return sampled(drawing, x - (width / 2) * step, y - (height / 2) * step, step, outside);
  }

  // float32 [channels, height, width] as training computes it: integers times a float32.
  function numbers({ planes }) {
    const { levels } = setup;
    const scale = Math.fround(1 / levels);
    const made = new Float32Array(channels * height * width);
    planes.forEach((plane, channel) => {
      plane.forEach((value, i) => {
        made[channel * height * width + i] = Math.round((value * levels) / 255) * scale;
      });
    });
    return made;
  }

  function paint(context, { planes }) {
    const image = context.createImageData(width, height);
    for (let i = 0; i < width * height; i++) {
      for (let c = 0; c < 3; c++) image.data[4 * i + c] = Math.round(planes[c % planes.length][i]);
      image.data[4 * i + 3] = 255;
    }
    context.putImageData(image, 0, 0);
  }

  // ---- Inference --------------------------------------------------------------------------------

  let ort = null;
  let session = null;
  let wanted = null; // the newest picture that is not yet classified
  let running = false;

  function say(text, alarm = false) {
    const status = byId("status");
    status.textContent = text;
    status.className = alarm ? "alarm" : "";
    status.hidden = !text;
  }

  async function start() {
    if (location.protocol === "file:") {
      say(
        "Opened as a file, this page cannot load the model: browsers forbid it. Serve its folder " +
          "with python -m http.server -d FOLDER and open the address that it prints.",
        true,
      );
      return;
    }
    say(`Loading onnxruntime-web (${bytes(setup.runtimeBytes)}) ...`);
    try {
      const here = new URL("./", location.href);
      ort = await import(new URL(setup.runtime, here).href);
      ort.env.wasm.numThreads = 1; // more need headers that plain servers do not send
      ort.env.wasm.wasmPaths = here.href;
      const options = { executionProviders: ["wasm"], logSeverityLevel: 3 };
      const answer = await fetch(new URL("model.onnx", here));
      if (!answer.ok) throw new Error(`model.onnx: the server says ${answer.status}`);
      const model = new Uint8Array(await answer.arrayBuffer());
      // Starting the runtime is not part of the model's load time: a model of one node goes first.
      const probe = Uint8Array.from(atob(setup.probe), (letter) => letter.charCodeAt(0));
      await (await ort.InferenceSession.create(probe, options)).release();
      const begun = performance.now();
      session = await ort.InferenceSession.create(model, options);
      byId("load").textContent = milliseconds(performance.now() - begun);
      showSize(model.length);
      const version = ort.env.versions?.web ?? "";
      byId("runtime").textContent =
        `Made with prune2onnx. The model is one plain ONNX file; onnxruntime-web ${version} ` +
        `(${bytes(setup.runtimeBytes)} before the server's compression, the same for any model) ` +
        "runs it on the processor, in one thread.";
      await run(new Float32Array(channels * height * width), true); // warms up, and is timed
      say("");
      document.documentElement.dataset.ready = "yes";
      answerNext();
    } catch (error) {
      say(`The model cannot be run here: ${error?.message ?? error}`, true);
    }
  }

  function showSize(nbytes) {
    byId("size").textContent = bytes(nbytes);
    const notes = nbytes < 1e6 ? [`${nbytes.toLocaleString("en")} bytes`] : [];
    if (setup.denseBytes > nbytes) {
      const times = setup.denseBytes / nbytes;
      notes.push(`${times.toFixed(times < 10 ? 1 : 0)} times smaller than ${bytes(setup.denseBytes)}`);
    }
    byId("size-note").textContent = notes.join(", ");
  }

  async function run(values, timed) {
    const tensor = new ort.Tensor("float32", values, [1, ...setup.shape]);
    const feeds = { [setup.input]: tensor };
    let scores = (await session.run(feeds))[setup.output];
    if (timed) {
      const begun = performance.now();
      let runs = 0;
      do {
        scores = (await session.run(feeds))[setup.output];
        runs++;
      } while (performance.now() - begun < TIMING_MS);
      byId("time").textContent = milliseconds((performance.now() - begun) / runs);
    }
    return Array.from(scores.data, Number);
  }

  // Classifies pictures one by one; of those that arrive meanwhile only the newest.
  async function answerNext() {
    if (running || !session || !wanted) return;
    running = true;
    const { values, timed } = wanted;
    wanted = null;
    try {
      showScores(probabilities(await run(values, timed)));
    } catch (error) {
      say(`The inference failed: ${error?.message ?? error}`, true);
    }
    running = false;
    answerNext();
  }

  function classify(input, timed) {
    paint(byId("seen").getContext("2d"), input);
    wanted = { values: numbers(input), timed };
    answerNext();
  }

  function probabilities(scores) {
    if (setup.probabilities) return scores;
    const largest = Math.max(...scores);
    const powers = scores.map((score) => Math.exp(score - largest));
    const sum = powers.reduce((a, b) => a + b);
    return powers.map((power) => power / sum);
  }

  // ---- Answers ----------------------------------------------------------------------------------

  const bars = setup.names.map((name) => {
    const [item, label, track, bar, percent] = ["li", "span", "div", "span", "span"].map((tag) =>
      document.createElement(tag),
    );
    label.textContent = label.title = name;
    track.className = "track";
    track.append(bar);
    item.append(label, track, percent);
    byId("scores").append(item);
    percent.textContent = "–";
    return { item, bar, percent };
  });
  const longest = Math.max(...setup.names.map((name) => name.length));
  byId("scores").style.setProperty("--names", `${Math.min(longest + 1, 16)}ch`);

  function showScores(scores) {
    const best = scores.indexOf(Math.max(...scores));
    bars.forEach(({ item, bar, percent }, i) => {
      item.classList.toggle("best", i === best);
      item.dataset.score = scores[i];
      bar.style.width = `${100 * scores[i]}%`;
      percent.textContent = percentage(scores[i]);
    });
    if (scores.length > SORTED) {
      const order = scores.map((_, i) => i).sort((a, b) => scores[b] - scores[a]);
      byId("scores").append(...order.map((i) => bars[i].item));
    }
    byId("name").textContent = setup.names[best];
    byId("name").classList.toggle("long", setup.names[best].length > 8);
    byId("sure").textContent = percentage(scores[best]);
    const answer = byId("answer").dataset;
    answer.best = best;
    answer.count = Number(answer.count ?? 0) + 1;
  }

  function clearScores() {
    wanted = null;
    byId("name").textContent = "–";
    byId("sure").textContent = "";
    for (const { item, bar, percent } of bars) {
      item.classList.remove("best");
      bar.style.width = "0";
      percent.textContent = "–";
    }
    byId("seen").getContext("2d").clearRect(0, 0, width, height);
  }

  const percentage = (part) => `${(100 * part).toFixed(1)} %`;

  function milliseconds(ms) {
    return `${ms.toFixed(ms < 1 ? 2 : ms < 100 ? 1 : 0)} ms`;
  }

  function bytes(count) {
    if (count < 1000) return `${count} B`;
    return count < 1e6 ? `${(count / 1e3).toFixed(1)} kB` : `${(count / 1e6).toFixed(1)} MB`;
  }

  // ---- The board --------------------------------------------------------------------------------

  function useBoard() {
    board.width = width * block;
    board.height = height * block;
    const context = board.getContext("2d", { willReadFrequently: true });
    const [fit, dark, pen] = [byId("fit"), byId("dark"), byId("pen")];
    const place = { x: board.width / 2, y: board.height / 2, down: false }; // the keyboard's pen
    let drawn = false; // by hand, not painted by an image or a script
    let last = null; // the end of the present stroke
    let asked = false;

    const ground = () => (dark?.checked ? 255 : 0);

    function look(timed) {
      const whole = picture(context, 1);
      const input =
        drawn && fit?.checked
          ? fitted(whole, setup.fit, ground())
          : sampled(whole, 0, 0, block, ground());
      classify(input, timed);
    }

    function lookSoon() {
      if (asked) return;
      asked = true;
      requestAnimationFrame(() => {
        asked = false;
        if (drawn) look(false);
      });
    }

    function clear() {
      context.fillStyle = ground() ? "#fff" : "#000";
      context.fillRect(0, 0, board.width, board.height);
      drawn = false;
      last = null;
      byId("hint").hidden = false;
      clearScores();
    }

    function stroke(from, to) {
      drawn ||= byId("hint").hidden === false; // an image that is drawn on remains an image
      byId("hint").hidden = true;
      context.strokeStyle = ground() ? "#000" : "#fff";
      context.lineWidth = setup.stroke * Math.min(board.width, board.height);
      context.lineCap = context.lineJoin = "round";
      context.beginPath();
      context.moveTo(from.x, from.y);
      context.lineTo(to.x, to.y);
      context.stroke();
      lookSoon();
    }

    function at(event) {
      const frame = board.getBoundingClientRect();
      return {
        x: ((event.clientX - frame.left) / frame.width) * board.width,
        y: ((event.clientY - frame.top) / frame.height) * board.height,
      };
    }

    board.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || last) return;
      board.setPointerCapture(event.pointerId);
      last = { ...at(event), id: event.pointerId };
      stroke(last, last);
    });
    board.addEventListener("pointermove", (event) => {
      if (last?.id !== event.pointerId) return;
      const passed = event.getCoalescedEvents?.() ?? [];
      for (const one of passed.length ? passed : [event]) {
        const to = { ...at(one), id: last.id };
        stroke(last, to);
        last = to;
      }
    });
    for (const kind of ["pointerup", "pointercancel"]) {
      board.addEventListener(kind, (event) => {
        if (last?.id !== event.pointerId) return;
        last = null;
        look(true);
      });
    }

    const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    board.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.altKey || event.metaKey) return;
      if (event.key in MOVES) {
        const step = Math.max(board.width, board.height) / 28;
        const [dx, dy] = MOVES[event.key];
        const from = { ...place };
        place.x = Math.min(board.width, Math.max(0, place.x + dx * step));
        place.y = Math.min(board.height, Math.max(0, place.y + dy * step));
        if (place.down) stroke(from, place);
      } else if (event.key === " ") {
        place.down = !place.down;
        if (place.down) stroke(place, place);
      } else if (event.key === "Delete" || event.key === "Backspace") {
        place.down = false;
        clear();
      } else return;
      event.preventDefault();
      showPen();
    });
    board.addEventListener("keyup", (event) => {
      if (drawn && (event.key in MOVES || event.key === " ")) look(true);
    });
    board.addEventListener("blur", () => {
      place.down = false;
      pen.hidden = true;
    });

    function showPen() {
      pen.hidden = false;
      pen.classList.toggle("down", place.down);
      pen.style.left = `${(100 * place.x) / board.width}%`;
      pen.style.top = `${(100 * place.y) / board.height}%`;
    }

    // Painted by an image or a script: taken as it is, block by block, neither scaled nor centred.
    board.addEventListener("change", () => {
      drawn = false;
      byId("hint").hidden = true;
      look(true);
    });
    byId("clear").addEventListener("click", clear);
    fit?.addEventListener("change", () => drawn && look(true));
    dark?.addEventListener("change", clear);
    clear();

    return (source) => {
      const seen = document.createElement("canvas");
      [seen.width, seen.height] = [width, height];
      paint(seen.getContext("2d"), cropped(source));
      context.imageSmoothingEnabled = false;
      context.drawImage(seen, 0, 0, board.width, board.height);
      board.dispatchEvent(new Event("change"));
    };
  }

  // ---- Images -----------------------------------------------------------------------------------

  // The largest middle part of a picture that has the proportions of the model's input.
  function cropped(source) {
    const step = Math.min(source.width / width, source.height / height);
    const [x, y] = [(source.width - step * width) / 2, (source.height - step * height) / 2];
    return sampled(source, x, y, step);
  }

  function useImages(take) {
    let newest = 0;

    async function open(file) {
      if (!file) return;
      const turn = ++newest;
      let bitmap;
      try {
        // Colours are not converted, as in training.
        bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" });
      } catch {
        say(`${file.name}: not an image that this browser can read`, true);
        return;
      }
      if (turn !== newest) return; // a later file has been read already
      if (session) say("");
      const scale = Math.min(1, LARGEST / Math.max(bitmap.width, bitmap.height));
      const canvas = document.createElement("canvas");
      canvas.width = Math.max(1, Math.round(bitmap.width * scale));
      canvas.height = Math.max(1, Math.round(bitmap.height * scale));
      const context = canvas.getContext("2d", { willReadFrequently: true });
      context.imageSmoothingQuality = "high";
      context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
      bitmap.close();
      take(picture(context, channels), file);
    }

    const input = byId("file");
    input.addEventListener("change", () => {
      open(input.files[0]);
      input.value = ""; // so that the same file can be chosen again
    });
    const drop = byId("drop");
    document.addEventListener("dragover", (event) => {
      event.preventDefault();
      drop?.classList.add("over");
    });
    document.addEventListener("dragleave", () => drop?.classList.remove("over"));
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      drop?.classList.remove("over");
      open(event.dataTransfer.files[0]);
    });
  }

  function showImage(source, file) {
    const shown = byId("shown");
    if (shown.src) URL.revokeObjectURL(shown.src);
    shown.src = URL.createObjectURL(file);
    shown.alt = file.name;
    shown.hidden = false;
    byId("hint").hidden = true;
    classify(cropped(source), true);
  }

  useImages(board ? useBoard() : showImage);
  start();
})();
