// Greedy decoding of an exported folder with onnxruntime-node (npm install onnxruntime-node):
//   node decode.mjs FOLDER NEW_TOKENS ID ID ID ...
import fs from "fs";
import ort from "onnxruntime-node";

const [folder, count, ...ids] = process.argv.slice(2);
const graphs = JSON.parse(fs.readFileSync(`${folder}/arkv.json`)).graphs;
const open = (name) => ort.InferenceSession.create(`${folder}/${graphs[name].file}`);
const [prefill, decode] = [await open("prefill"), await open("decode")];
const row = (numbers) => new ort.Tensor("int64", BigInt64Array.from(numbers, BigInt), [1, numbers.length]);

const tokens = [];
let out = await prefill.run({
  input_ids: row(ids), attention_mask: row(ids.map(() => 1)), position_ids: row(ids.map((_, i) => i)),
});
for (let place = ids.length; tokens.length < Number(count); place++) {
  const { logits, ...state } = out;
  tokens.push(logits.data.indexOf(logits.data.reduce((a, b) => Math.max(a, b))));
  const feeds = { input_ids: row(tokens.slice(-1)), position_ids: row([place]) };
  for (const [name, tensor] of Object.entries(state)) feeds[name.replace("present", "past_key_values")] = tensor;
  out = await decode.run(feeds);
}
console.log(JSON.stringify(tokens));
