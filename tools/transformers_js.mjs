// Opens a packed folder with transformers.js under Node, from this machine alone, and compares its
// embeddings with those of another folder, bit for bit.
//
//     node tools/transformers_js.mjs PACKAGES TEXT FOLDER [REFERENCE]
//
// PACKAGES is a folder with node_modules, in which @huggingface/transformers is installed (npm
// install --ignore-scripts @huggingface/transformers). TEXT has one sentence a line, FOLDER and
// REFERENCE hold config.json, tokenizer.json and onnx/. Nothing is said of dtype: config.json names
// it. REFERENCE is a copy of FOLDER with the files unpacked:
//
//     cp -r packed unpacked
//     prune2onnx unpack packed/onnx/model.onnx unpacked/onnx/model.onnx
//
// Exit status 1 where an embedding differs in a bit.

import { readFileSync } from "node:fs";
import { basename, dirname, join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [packages, text, ...folders] = process.argv.slice(2);
const root = join(resolve(packages), "node_modules", "@huggingface", "transformers");
const library = await import(pathToFileURL(join(root, "dist", "transformers.node.mjs")));
const { env, pipeline } = library;
env.allowRemoteModels = false;
env.useFSCache = false;
globalThis.fetch = (url) => {
  throw new Error(`a remote call: ${url}`);
};

const lines = readFileSync(text, "utf8").split("\n").filter((line) => line.trim());

async function embedded(folder) {
  const path = resolve(folder);
  env.localModelPath = dirname(path);
  const begun = performance.now();
  const extract = await pipeline("feature-extraction", basename(path));
  const opened = performance.now() - begun;
  const options = { pooling: "mean", normalize: true };
  const vectors = [];
  const start = performance.now();
  for (const line of lines) vectors.push(Float32Array.from((await extract(line, options)).data));
  const each = (performance.now() - start) / lines.length;
  console.log(`${folder}: opened in ${opened.toFixed(0)} ms, ${each.toFixed(2)} ms a sentence`);
  await extract.dispose();
  return vectors;
}

const [made, reference] = [await embedded(folders[0]), folders[1] && (await embedded(folders[1]))];
console.log(`transformers.js ${env.version}: ${made.length} embeddings of ${made[0].length} numbers`);
if (reference) {
  const same = (a, b) => Buffer.from(a.buffer).equals(Buffer.from(b.buffer));
  const different = made.filter((vector, i) => !same(vector, reference[i])).length;
  const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
  const cosine = made.reduce((sum, vector, i) => sum + dot(vector, reference[i]), 0) / made.length;
  console.log(`${different} of them differ in a bit; mean cosine ${cosine.toFixed(4)}`);
  process.exitCode = different ? 1 : 0;
}
