"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const total = data.tokens.length;
const evicted = data.states.findIndex((state) => state.role === "evicted");
const gone = new Set(data.states.flatMap((s, i) => (["evicted", "outside"].includes(s.role) ? [i] : [])));

// What Series.packed wrote: for each step [positions, differences].
function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  let at = 0;
  const number = () => {
    let value = 0;
    for (let scale = 1; ; scale *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
  };
  return data.lengths.map(() => {
    const count = number();
    const [positions, differences] = [new Int32Array(count), new Int32Array(count)];
    for (let i = 0, position = -1; i < count; i++) {
      position += number() + 1;
      const zigzag = number();
      positions[i] = position;
      differences[i] = zigzag % 2 ? -(zigzag + 1) / 2 : zigzag / 2;
    }
    return [positions, differences];
  });
}

const layers = data.layers.map((layer) => ({
  name: layer.layer,
  heads: layer.heads,
  series: [unpack(layer.mixes), unpack(layer.scores)],
  now: [new Int32Array(total), new Int32Array(total)], // mixes and scores after step `at`
}));
let at = -1;

function goTo(step) {
  if (step < at) {
    layers.forEach((layer) => layer.now.forEach((numbers) => numbers.fill(0)));
    at = -1;
  }
  for (; at < step; at++) {
    for (const { series, now } of layers) {
      series.forEach((steps, which) => {
        const [positions, differences] = steps[at + 1];
        for (let i = 0; i < positions.length; i++) now[which][positions[i]] += differences[i];
      });
    }
  }
}

// The text: a span a token, of which one at a time can be reached by Tab.
const text = $("text");
const spans = data.tokens.map((piece, position) => {
  const span = document.createElement("span");
  if (position === data.prompt) {
    const mark = document.createElement("span");
    mark.className = "boundary";
    mark.textContent = "generated";
    text.append(mark);
  }
  // A line's end is a token, too, and needs something to point at.
  span.textContent = piece === "" ? "·" : piece.replace(/\n/g, "↵\n");
  if (piece === "") span.title = "part of the character before it";
  span.className = "token";
  span.tabIndex = position ? -1 : 0;
  span.dataset.position = position;
  text.append(span);
  return span;
});

const chosen = () => ($("layer").value === "all" ? layers : [layers[Number($("layer").value)]]);

function shares(position, among) {
  const counts = new Array(data.states.length).fill(0);
  let heads = 0;
  for (const layer of among) {
    const mix = data.mixes[layer.now[0][position]];
    for (let i = 0; i < mix.length; i++) counts[i] += mix[i];
    heads += layer.heads;
  }
  return counts.map((count) => count / heads);
}

function stack(parts) {
  let below = 0;
  const stops = [];
  parts.forEach((part, i) => {
    if (!part || i === evicted) return;
    const above = below + 100 * part;
    stops.push(`var(--${data.states[i].role}) ${below.toFixed(1)}% ${above.toFixed(1)}%`);
    below = above;
  });
  if (!stops.length) return "none";
  stops.push(`transparent ${below.toFixed(1)}%`);
  return `linear-gradient(to top, ${stops.join(", ")})`;
}

const percent = (part) => `${part > 0 && part < 0.01 ? "<1" : Math.round(100 * part)} %`;

function draw() {
  goTo(Number($("step").value));
  const [length, among] = [data.lengths[at], chosen()];
  const totals = new Array(data.states.length).fill(0);
  spans.forEach((span, position) => {
    span.hidden = position > length;
    if (position >= length) {
      span.className = "token new";
      span.style.backgroundImage = "none";
      return;
    }
    const parts = shares(position, among);
    parts.forEach((part, i) => { totals[i] += part; });
    const most = parts.indexOf(Math.max(...parts));
    const name = `token ${data.states[most].role}`;
    if (span.className !== name) span.className = name;
    const image = stack(parts);
    if (span.stacked !== image) span.style.backgroundImage = span.stacked = image;
  });
  const mark = text.querySelector(".boundary");
  if (mark) mark.hidden = length < data.prompt;
  totals.forEach((count, i) => {
    document.querySelector(`[data-count="${i}"]`).textContent =
      `${Number(count.toFixed(1))} tokens, ${percent(count / length)}`;
  });
  $("unread").textContent = length < total ? "1 token" : "0 tokens";
  const told = at ? `after ${at} generated token${at > 1 ? "s" : ""}` : "after the prompt";
  $("when").textContent = `${told}: ${length} tokens read`;
  $("step").setAttribute("aria-valuetext", told);
  if (spans[current].hidden) current = length;
  tell(shown);
}

function ranges(numbers) {
  const out = [];
  for (const n of numbers) {
    const last = out[out.length - 1];
    if (last && last[1] === n - 1) last[1] = n;
    else out.push([n, n]);
  }
  return out.map(([a, b]) => (a === b ? `${a}` : `${a}-${b}`)).join(", ");
}

const scoreOf = (code) => Math.sign(code) * 2 ** ((Math.abs(code) - data.lowest) / data.octave);

let current = 0; // who Tab leads to
let shown = null; // who is told of

function tell(position) {
  shown = position;
  if (position === null) return;
  const line = document.createElement("p");
  const piece = JSON.stringify(data.tokens[position] || "(part of a character)");
  const where = position < data.prompt ? "of the prompt" : "generated";
  const said = [`Token ${position}, ${piece}, ${where}.`];
  if (position >= data.lengths[at]) {
    said.push("Not read yet: chosen from the last step's predictions.");
  } else {
    const among = chosen();
    const parts = shares(position, among);
    const heads = among.reduce((sum, layer) => sum + layer.heads, 0);
    const whose = among.length > 1 ? `${heads} heads of ${among.length} layers` : `${heads} heads of layer ${among[0].name}`;
    const states = parts.flatMap((part, i) => (part ? [`${data.states[i].name} ${percent(part)}`] : []));
    said.push(`Of ${whose}: ${states.join("; ")}.`);
    const codes = among.map((layer) => layer.now[1][position]).filter((code) => code);
    const mean = codes.reduce((sum, code) => sum + scoreOf(code), 0) / codes.length;
    said.push(codes.length ? `Score ${mean.toPrecision(2)}.` : "Score: none.");
    const holding = layers.filter((layer) => data.mixes[layer.now[0][position]].some((n, i) => n && !gone.has(i)));
    const names = holding.length ? `: ${ranges(holding.map((layer) => layer.name))}` : "";
    said.push(`Held by ${holding.length} of ${layers.length} layers${names}.`);
  }
  line.textContent = said.join(" ");
  $("info").replaceChildren(line);
}

function move(to) {
  spans[current].tabIndex = -1;
  current = Math.max(0, Math.min(to, data.lengths[at], total - 1));
  spans[current].tabIndex = 0;
  spans[current].focus();
}

// The token above or below: the nearest one of the next line that has any.
function vertical(direction) {
  const from = spans[current].getBoundingClientRect();
  let [best, distance, line] = [current, Infinity, null];
  for (let i = current + direction; i >= 0 && i < total && !spans[i].hidden; i += direction) {
    const box = spans[i].getBoundingClientRect();
    if ((box.top - from.top) * direction < 4) continue;
    if (line === null) line = box.top;
    if (Math.abs(box.top - line) > 4) break;
    if (Math.abs(box.left - from.left) < distance) [best, distance] = [i, Math.abs(box.left - from.left)];
  }
  return best;
}

const KEYS = {
  ArrowLeft: () => current - 1,
  ArrowRight: () => current + 1,
  ArrowUp: () => vertical(-1),
  ArrowDown: () => vertical(1),
  Home: () => 0,
  End: () => total,
};
text.addEventListener("keydown", (event) => {
  if (!(event.key in KEYS) || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  move(KEYS[event.key]());
});
const positionOf = (event) => {
  const span = event.target.closest(".token");
  return span ? Number(span.dataset.position) : null;
};
text.addEventListener("focusin", (event) => {
  const position = positionOf(event);
  if (position === null) return;
  spans[current].tabIndex = -1;
  current = position;
  spans[current].tabIndex = 0;
  tell(position);
});
text.addEventListener("mouseover", (event) => {
  const position = positionOf(event);
  if (position !== null) tell(position);
});
text.addEventListener("mouseleave", () => {
  if (text.contains(document.activeElement)) tell(current);
});
$("step").addEventListener("input", draw);
$("layer").addEventListener("change", draw);
draw();
