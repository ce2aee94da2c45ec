// Opens FOLDER/NAME.onnx in onnxruntime-web (wasm, one thread) under Node; `runtimes.py` calls it.
//
//     node tools/web.mjs FOLDER NAME PACKAGES LOADS
//
// PACKAGES is a folder with node_modules. FOLDER/inputs.json holds one example, [{name, type, dims,
// data}] with data in base64. FOLDER/NAME.json gets {load_ms, peak_mb, outputs}, with outputs in
// the same form. The first session logs everything, also how many nodes are left to run; the sessions
// after it are timed.

import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join, resolve } from "node:path";

const [folder, name, packages, loads] = process.argv.slice(2);
const require = createRequire(join(resolve(packages), "/"));
let ort;
try {
  ort = require("onnxruntime-web/wasm");
} catch {
  ort = require("onnxruntime-web"); // before 1.21 there is one build for all
}
ort.env.wasm.numThreads = 1;

const ARRAYS = {
  float32: Float32Array,
  float64: Float64Array,
  float16: Uint16Array,
  int8: Int8Array,
  int16: Int16Array,
  int32: Int32Array,
  int64: BigInt64Array,
  uint8: Uint8Array,
  uint16: Uint16Array,
  uint32: Uint32Array,
  uint64: BigUint64Array,
  bool: Uint8Array,
};

const model = readFileSync(join(folder, `${name}.onnx`));
const open = (logSeverityLevel) =>
  ort.InferenceSession.create(model, { executionProviders: ["wasm"], logSeverityLevel });

const feeds = {};
for (const { name, type, dims, data } of JSON.parse(readFileSync(join(folder, "inputs.json")))) {
  const bytes = new Uint8Array(Buffer.from(data, "base64")); // a copy that starts at offset 0
  feeds[name] = new ort.Tensor(type, new ARRAYS[type](bytes.buffer), dims);
}

const session = await open(0);
const results = await session.run(feeds);
const outputs = session.outputNames.map((name) => {
  const { type, dims, data } = results[name];
  const bytes = Buffer.from(data.buffer, data.byteOffset, data.byteLength);
  return { name, type, dims, data: bytes.toString("base64") };
});
// resourceUsage().maxRSS would begin with what the parent process had when it was forked
const peak_mb = Number(/VmHWM:\s+(\d+)/.exec(readFileSync("/proc/self/status", "utf8"))[1]) / 1000;

const times = [];
for (let load = 0; load < Number(loads); load++) {
  const start = performance.now();
  const timed = await open(3);
  times.push(performance.now() - start);
  await timed.release();
}
times.sort((a, b) => a - b);
const load_ms = times[Math.floor(times.length / 2)];
writeFileSync(join(folder, `${name}.json`), JSON.stringify({ load_ms, peak_mb, outputs }));
