// The search page of `prune2onnx demo`: embeds sentences with transformers.js, and orders them by
// the cosine of their angle to the query's embedding. Everything is fetched from this folder.

(() => {
  "use strict";

  const byId = (id) => document.getElementById(id);
  const setup = JSON.parse(byId("setup").textContent);
  const SHOWN = 10; // of the nearest sentences
  const PAUSE_MS = 150; // without a key, before a query is answered

  let extract = null;
  let known = new Map(); // sentence -> its embedding
  let turn = 0;

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
    say(`Loading transformers.js (${bytes(setup.runtimeBytes)}) and the model ...`);
    try {
      const here = new URL("./", location.href);
      const { env, pipeline } = await import(new URL(setup.library, here).href);
      env.allowRemoteModels = false;
      env.allowLocalModels = true;
      env.localModelPath = here.pathname;
      env.useBrowserCache = false; // the server's headers say what may be kept
      env.useWasmCache = false; // it would be run from a blob, which this page's policy forbids
      const [mjs, wasm] = setup.wasm.map((name) => new URL(name, here).href);
      env.backends.onnx.wasm.wasmPaths = { mjs, wasm };
      env.backends.onnx.wasm.numThreads = 1; // more need headers that plain servers do not send
      const begun = performance.now();
      extract = await pipeline("feature-extraction", setup.model, {
        dtype: setup.dtype,
        device: "wasm",
      });
      byId("load").textContent = milliseconds(performance.now() - begun);
      byId("size").textContent = bytes(setup.modelBytes);
      byId("runtime").textContent =
        `Made with prune2onnx. The model is plain ONNX; transformers.js ${env.version ?? ""} with ` +
        `onnxruntime-web (${bytes(setup.runtimeBytes)} before the server's compression, the same ` +
        "for any model) runs it on the processor, in one thread.";
      await embedded(setup.sentences[0]); // warms up
      await update();
      document.documentElement.dataset.ready = "yes";
    } catch (error) {
      say(`The model cannot be run here: ${error?.message ?? error}`, true);
    }
  }

  async function embedded(sentence) {
    const made = await extract(sentence, { pooling: setup.pooling, normalize: true });
    return Float32Array.from(made.data);
  }

  const sentences = () => [
    ...new Set(
      byId("sentences")
        .value.split("\n")
        .map((line) => line.trim())
        .filter(Boolean),
    ),
  ];

  // Embeds what is new, then answers; a newer call ends an older one.
  async function update() {
    if (!extract) return;
    const own = ++turn;
    try {
      const lines = sentences();
      const fresh = lines.filter((line) => !known.has(line));
      const begun = performance.now();
      for (const [done, line] of fresh.entries()) {
        known.set(line, await embedded(line));
        if (own !== turn) return;
        say(`Reading sentences: ${done + 1} of ${fresh.length}`);
        if (done % 8 === 7) await new Promise((go) => setTimeout(go)); // keys are seen meanwhile
      }
      if (fresh.length) {
        byId("time").textContent = milliseconds((performance.now() - begun) / fresh.length);
      }
      say("");
      const query = byId("query").value.trim();
      const wanted = query ? await embedded(query) : null;
      if (own === turn) show(wanted, lines);
    } catch (error) {
      say(`The search failed: ${error?.message ?? error}`, true);
    }
  }

  function show(wanted, lines) {
    const list = byId("found");
    list.replaceChildren();
    list.dataset.query = byId("query").value.trim();
    if (!wanted) return;
    const scored = lines.map((line) => [cosine(wanted, known.get(line)), line]);
    scored.sort((a, b) => b[0] - a[0]);
    for (const [score, line] of scored.slice(0, SHOWN)) {
      const item = document.createElement("li");
      const [text, number, track, bar] = ["span", "span", "div", "span"].map((tag) =>
        document.createElement(tag),
      );
      text.textContent = line;
      number.className = "score";
      number.textContent = score.toFixed(2);
      track.className = "track";
      bar.style.width = `${100 * Math.max(0, score)}%`;
      track.append(bar);
      item.append(text, number, track);
      item.dataset.score = score;
      list.append(item);
    }
  }

  const cosine = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0); // of length 1 both

  function milliseconds(ms) {
    return `${ms.toFixed(ms < 1 ? 2 : ms < 100 ? 1 : 0)} ms`;
  }

  function bytes(count) {
    return count < 1e6 ? `${(count / 1e3).toFixed(1)} kB` : `${(count / 1e6).toFixed(1)} MB`;
  }

  let pause = 0;
  for (const id of ["query", "sentences"]) {
    byId(id).addEventListener("input", () => {
      clearTimeout(pause);
      pause = setTimeout(update, PAUSE_MS);
    });
  }
  start();
})();
