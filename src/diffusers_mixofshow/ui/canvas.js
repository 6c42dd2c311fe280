// The canvas on which regions are drawn. Runs as the `js_on_load` of a gr.HTML: `element` is its node, `props.value` the
// layout as canvas.py describes it, `props.concepts` the placeholders that prompts may name.
const COLOURS = ["#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000"];
const FINE = 0.01, LEAST = 0.03, GRID = 256;
const EDGES = ["lt", "t", "rt", "r", "rb", "b", "lb", "l"];
const SIDES = ["Left", "Top", "Right", "Bottom"];
let tool = "box", selected = -1, drag = null, cursor = [0.5, 0.5], masks = [];
let complained = false; // whether what was said last is about a number that is not taken
let before = null; // the box whose numbers are being typed, as it was before

const find = (selector) => element.querySelector(selector);
const all = (selector) => [...element.querySelectorAll(selector)];
const regions = () => props.value.regions;
const clamp = (number, low = 0, high = 1) => Math.min(high, Math.max(low, number));
const round = (number) => Math.round(number * 1000) / 1000;
const title = (index) => regions()[index].name || `Region ${index + 1}`;
const say = (text, wrong = false) => { find(".mos-live").textContent = text; complained = wrong; };

function node(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, given] of Object.entries(attributes)) made.setAttribute(name, given);
  made.append(...children);
  return made;
}

// What is drawn becomes the component's value; Python sees it when a button sends it.
function keep(index, change) {
  const changed = regions().map((region, at) => (at === index ? { ...region, ...change } : region));
  props.value = { ...props.value, regions: changed };
  if (complained) say("");
}

function add(shape) {
  const index = regions().length;
  const region = { name: "", colour: COLOURS[index % COLOURS.length], prompt: "", ...shape };
  props.value = { ...props.value, regions: [...regions(), region] };
  selected = index;
  build();
  say(`${title(index)} added`);
  return index;
}

const shared = (one, other) =>
  Math.max(0, Math.min(one[2], other[2]) - Math.max(one[0], other[0])) * Math.max(0, Math.min(one[3], other[3]) - Math.max(one[1], other[1]));

// The first box that covers least of the boxes that are there: the middle, beside it, then cells of a grid.
function findRoom() {
  const cells = [0, 0.33, 0.66].flatMap((top) => [0, 0.25, 0.5, 0.75].map((left) => [left + 0.01, top + 0.01, left + 0.24, top + 0.32]));
  const rooms = [[0.25, 0.25, 0.75, 0.95], [0.76, 0.25, 0.99, 0.95], [0.01, 0.25, 0.24, 0.95], ...cells];
  const taken = regions().filter((region) => region.box).map((region) => region.box);
  const covered = rooms.map((room) => taken.reduce((sum, box) => sum + shared(room, box), 0));
  return rooms[covered.indexOf(Math.min(...covered))].map(round);
}

function remove(index) {
  const name = title(index);
  props.value = { ...props.value, regions: regions().filter((_, at) => at !== index) };
  selected = Math.min(selected, regions().length - 1);
  build();
  say(`${name} removed`);
  (all(".mos-box")[selected] || find(".mos-stage")).focus();
}

function select(index) {
  selected = index;
  for (const each of all("[data-region]")) each.setAttribute("aria-current", String(+each.dataset.region === index));
}

// ---- what is shown

function build() {
  const stage = find(".mos-stage"), { width, height } = props.value;
  stage.style.aspectRatio = `${width} / ${height}`;
  stage.style.setProperty("--mos-widest", `${Math.round(Math.min(640, (460 * width) / height))}px`);
  stage.replaceChildren();
  masks = regions().map((region) => (region.mask ? maskOf(region) : null));
  regions().forEach((region, index) => stage.append(masks[index] || boxOf(index)));
  find(".mos-list").replaceChildren(...regions().map((_, index) => rowOf(index)));
  for (const side of ["width", "height"]) find(`[data-size="${side}"]`).value = props.value[side];
  selected = clamp(selected, -1, regions().length - 1);
  select(selected);
  choose(tool);
}

function boxOf(index) {
  const box = node("div", { class: "mos-box", tabindex: 0, role: "group", "data-region": index });
  box.append(node("span", { class: "mos-name" }));
  for (const edges of EDGES) box.append(node("span", { class: "mos-handle", "data-edges": edges }));
  for (const handle of box.querySelectorAll(".mos-handle")) {
    const edges = handle.dataset.edges;
    handle.style.left = edges.includes("l") ? "0" : edges.includes("r") ? "100%" : "50%";
    handle.style.top = edges.includes("t") ? "0" : edges.includes("b") ? "100%" : "50%";
  }
  place(index, box);
  return box;
}

function place(index, box = find(`.mos-box[data-region="${index}"]`)) {
  const { box: edges, colour } = regions()[index], percent = edges.map((edge) => Math.round(edge * 1000) / 10);
  box.style.setProperty("--mos-colour", colour);
  box.style.left = `${edges[0] * 100}%`;
  box.style.top = `${edges[1] * 100}%`;
  box.style.width = `${(edges[2] - edges[0]) * 100}%`;
  box.style.height = `${(edges[3] - edges[1]) * 100}%`;
  box.querySelector(".mos-name").textContent = title(index);
  const [left, top, right, bottom] = percent;
  box.setAttribute("aria-label", `${title(index)}: left ${left}, top ${top}, right ${right}, bottom ${bottom} percent`);
  all(`.mos-row[data-region="${index}"] [data-edge]`).forEach((field, at) => {
    if (field !== document.activeElement) field.value = percent[at];
  });
}

function rowOf(index) {
  const region = regions()[index], of = ` of region ${index + 1}`;
  const row = node("li", { class: "mos-row", "data-region": index });
  row.style.setProperty("--mos-colour", region.colour);
  const field = (name, type, label, shown, hint = label) => {
    const made = node("input", { type, "data-field": name, "aria-label": label + of, placeholder: hint });
    made.value = shown || "";
    return made;
  };
  row.append(
    field("colour", "color", "Colour", region.colour),
    field("name", "text", "Name", region.name),
    field("prompt", "text", "Prompt", region.prompt, "Prompt: what it is and where, like a red vase in a meadow"),
    field("negative_prompt", "text", "What to avoid", region.negative_prompt),
    node("button", { type: "button", "data-act": "remove", "aria-label": `Remove${of}` }, "Remove"),
  );
  const names = (props.concepts || []).map((name) => node("button", { type: "button", "data-concept": name }, name));
  if (names.length) row.append(node("div", { class: "mos-wide mos-concepts" }, "Insert ", ...names));
  const shape = node("div", { class: "mos-wide" });
  if (region.mask) shape.append("a painted mask");
  else {
    SIDES.forEach((side, at) => {
      const edge = node("input", { type: "number", "data-edge": at, min: 0, max: 100, step: 1, "aria-label": side + of });
      edge.value = Math.round(region.box[at] * 1000) / 10;
      shape.append(node("label", {}, side, edge));
    });
    shape.append("%", node("button", { type: "button", "data-act": "to-mask" }, "Make it a mask"));
  }
  row.append(shape);
  return row;
}

function choose(name) {
  tool = name;
  for (const button of all("[data-tool]")) button.setAttribute("aria-pressed", String(button.dataset.tool === name));
  find(".mos-stage").classList.toggle("mos-painting", tool !== "box");
  find(".mos-cursor")?.remove();
}

// ---- masks: white inside, kept as a PNG of at most GRID pixels a side

function maskOf(region) {
  const { width, height } = props.value, scale = GRID / Math.max(width, height);
  const size = { width: Math.round(width * scale), height: Math.round(height * scale) };
  const canvas = node("canvas", { class: "mos-mask", ...size }), read = node("canvas", size);
  const picture = new Image();
  picture.onload = () => {
    const pen = read.getContext("2d");
    pen.drawImage(picture, 0, 0, read.width, read.height);
    const pixels = pen.getImageData(0, 0, read.width, read.height);
    for (let at = 0; at < pixels.data.length; at += 4) pixels.data[at + 3] = pixels.data[at] > 127 ? 255 : 0;
    pen.putImageData(pixels, 0, 0);
    tint(read, region.colour);
    canvas.getContext("2d").drawImage(read, 0, 0); // keeps what was painted while the picture was read
  };
  picture.src = region.mask;
  return canvas;
}

function tint(canvas, colour) {
  const pen = canvas.getContext("2d");
  pen.globalCompositeOperation = "source-in";
  pen.fillStyle = colour;
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.globalCompositeOperation = "source-over";
}

function pngOf(canvas) {
  const flat = node("canvas", { width: canvas.width, height: canvas.height }), pen = flat.getContext("2d");
  pen.drawImage(canvas, 0, 0);
  const pixels = pen.getImageData(0, 0, flat.width, flat.height);
  for (let at = 0; at < pixels.data.length; at += 4) {
    pixels.data.fill(pixels.data[at + 3] > 127 ? 255 : 0, at, at + 3);
    pixels.data[at + 3] = 255;
  }
  pen.putImageData(pixels, 0, 0);
  return flat.toDataURL("image/png");
}

function filled(box) {
  const { width, height } = props.value, scale = GRID / Math.max(width, height);
  const canvas = node("canvas", { width: Math.round(width * scale), height: Math.round(height * scale) });
  if (box) {
    const [left, top, right, bottom] = box;
    canvas.getContext("2d").fillRect(left * canvas.width, top * canvas.height, (right - left) * canvas.width, (bottom - top) * canvas.height);
  }
  return pngOf(canvas);
}

// Paints from one point to another, as the pointer may have gone far between two events.
function brush([x, y], [fromX, fromY] = [x, y]) {
  const canvas = masks[selected], pen = canvas.getContext("2d");
  pen.globalCompositeOperation = tool === "erase" ? "destination-out" : "source-over";
  pen.strokeStyle = regions()[selected].colour;
  pen.lineWidth = (find(".mos-brush").value / 100) * Math.max(canvas.width, canvas.height);
  pen.lineCap = "round";
  pen.beginPath();
  pen.moveTo(fromX * canvas.width, fromY * canvas.height);
  pen.lineTo(x * canvas.width, y * canvas.height);
  pen.stroke();
  pen.globalCompositeOperation = "source-over";
}

function needMask() {
  if (!masks[selected]) {
    if (tool === "erase") return false;
    add({ mask: filled(null) });
  }
  return true;
}

// ---- pointer

function at(event) {
  const frame = find(".mos-stage").getBoundingClientRect();
  return [clamp((event.clientX - frame.left) / frame.width), clamp((event.clientY - frame.top) / frame.height)];
}

function moved(box, dx, dy) {
  const [left, top, right, bottom] = box;
  dx = clamp(dx, -left, 1 - right);
  dy = clamp(dy, -top, 1 - bottom);
  return [left + dx, top + dy, right + dx, bottom + dy].map(round);
}

function resized(box, edges, dx, dy) {
  let [left, top, right, bottom] = box;
  if (edges.includes("l")) left = clamp(left + dx, 0, right - LEAST);
  if (edges.includes("t")) top = clamp(top + dy, 0, bottom - LEAST);
  if (edges.includes("r")) right = clamp(right + dx, left + LEAST, 1);
  if (edges.includes("b")) bottom = clamp(bottom + dy, top + LEAST, 1);
  return [left, top, right, bottom].map(round);
}

function begin(event) {
  const stage = event.target.closest(".mos-stage");
  if (!stage || event.button) return;
  event.preventDefault();
  const start = at(event), box = event.target.closest(".mos-box");
  if (tool !== "box") {
    if (!needMask()) return say("Select a painted region first");
    drag = { kind: "brush", last: start };
    brush(start);
  } else if (box) {
    select(+box.dataset.region);
    box.focus();
    const edges = event.target.dataset.edges;
    drag = { kind: edges ? "resize" : "move", edges, start, box: regions()[selected].box };
  } else drag = { kind: "new", start };
  stage.setPointerCapture(event.pointerId);
}

function go(event) {
  if (!drag) return;
  const [x, y] = at(event);
  if (drag.kind === "brush") {
    brush([x, y], drag.last);
    drag.last = [x, y];
    return;
  }
  const [dx, dy] = [x - drag.start[0], y - drag.start[1]];
  if (drag.kind === "new") {
    if (Math.abs(dx) < LEAST || Math.abs(dy) < LEAST) return;
    const [left, top] = [Math.min(x, drag.start[0]), Math.min(y, drag.start[1])];
    const drawn = [left, top, left + Math.abs(dx), top + Math.abs(dy)].map(round);
    if (drag.index === undefined) drag.index = add({ box: drawn });
    else keep(drag.index, { box: drawn });
    return place(drag.index);
  }
  keep(selected, { box: drag.kind === "move" ? moved(drag.box, dx, dy) : resized(drag.box, drag.edges, dx, dy) });
  place(selected);
}

function end() {
  if (drag?.kind === "brush") keep(selected, { mask: pngOf(masks[selected]) });
  else if (drag?.index !== undefined) find(`.mos-row[data-region="${drag.index}"] [data-field="prompt"]`).focus({ preventScroll: true });
  drag = null;
}

// ---- keyboard

const ARROWS = { ArrowLeft: [-FINE, 0], ArrowRight: [FINE, 0], ArrowUp: [0, -FINE], ArrowDown: [0, FINE] };

function press(event) {
  const box = event.target.closest(".mos-box"), arrow = ARROWS[event.key];
  if (box) {
    const index = +box.dataset.region, old = regions()[index].box;
    if (event.key === "Delete" || event.key === "Backspace") remove(index);
    else if (arrow) {
      keep(index, { box: event.shiftKey ? resized(old, "rb", ...arrow) : moved(old, ...arrow) });
      place(index);
    } else return;
    event.preventDefault();
  } else if (event.target.classList.contains("mos-stage") && tool !== "box") {
    if (arrow) cursor = [clamp(cursor[0] + 2 * arrow[0]), clamp(cursor[1] + 2 * arrow[1])];
    else if (event.key === " " && needMask()) {
      brush(cursor);
      keep(selected, { mask: pngOf(masks[selected]) });
    } else return;
    showCursor();
    event.preventDefault();
  }
}

function showCursor() {
  const stage = find(".mos-stage"), size = (find(".mos-brush").value / 100) * Math.max(stage.clientWidth, stage.clientHeight);
  const ring = find(".mos-cursor") || stage.appendChild(node("span", { class: "mos-cursor" }));
  Object.assign(ring.style, { left: `${cursor[0] * 100}%`, top: `${cursor[1] * 100}%`, width: `${size}px`, height: `${size}px` });
}

// ---- fields and buttons

function typed(event) {
  const field = event.target, row = field.closest(".mos-row"), index = row && +row.dataset.region;
  if (field.dataset.size) {
    if (event.type !== "change") return;
    const pixels = Math.round(+field.value / 8) * 8, fits = pixels >= 8 && pixels <= field.max;
    if (fits) props.value = { ...props.value, [field.dataset.size]: pixels };
    if (!fits) say(`The ${field.dataset.size} stays: got ${field.value || "no number"}, expected 8 to ${field.max}`, true);
    else if (complained) say("");
    build();
  } else if (field.dataset.field) {
    keep(index, { [field.dataset.field]: field.value });
    row.style.setProperty("--mos-colour", regions()[index].colour);
    if (regions()[index].box) place(index);
    else if (field.dataset.field === "colour") tint(masks[index], field.value);
  } else if (field.dataset.edge) {
    typedEdge(field, index, event.type === "change");
  }
}

// A box takes a number that it can have, and stays as it was before the number was typed where it cannot. The field shows
// what the box has once it is left.
function typedEdge(field, index, left) {
  before ||= regions()[index].box;
  const which = +field.dataset.edge, box = [...before], number = field.value === "" ? NaN : +field.value;
  box[which] = round(number / 100);
  const wrong = defectOf(box, which, number);
  keep(index, { box: wrong ? before : box });
  place(index);
  if (wrong && (left || field.value !== "")) say(`${title(index)} stays as it was: ${wrong}`, true);
  if (!left) return;
  field.value = Math.round(regions()[index].box[which] * 1000) / 10;
  before = null;
}

function defectOf(box, which, number) {
  const upper = which > 1, other = box[(which + 2) % 4], percent = (part) => Math.round(part * 1000) / 10;
  const [least, most] = upper ? [other + LEAST, 1] : [0, other - LEAST];
  if (box[which] >= least - 1e-9 && box[which] <= most + 1e-9) return "";
  const got = Number.isNaN(number) ? "no number" : number;
  return `got ${got} for ${SIDES[which].toLowerCase()}, expected ${percent(least)} to ${percent(most)} %`;
}

function clicked(event) {
  const button = event.target.closest("button");
  if (!button) return;
  const row = button.closest(".mos-row"), index = row && +row.dataset.region;
  if (button.dataset.tool) choose(button.dataset.tool);
  else if (button.dataset.act === "add") {
    const made = add({ box: findRoom() });
    find(`.mos-box[data-region="${made}"]`).focus();
  } else if (button.dataset.act === "remove") remove(index);
  else if (button.dataset.act === "to-mask") {
    const mask = filled(regions()[index].box);
    keep(index, { mask, box: undefined });
    selected = index;
    tool = "paint";
    build();
  } else if (button.dataset.concept) insert(row.querySelector('[data-field="prompt"]'), button.dataset.concept, index);
}

// Puts a concept's name where the caret is, in place of what was begun to be typed of it; "a" before it where it is first.
function insert(field, name, index) {
  const begun = field.value.slice(0, field.selectionStart).replace(/<[^<>\s]*$/, "");
  const rest = field.value.slice(field.selectionEnd);
  const before = begun.trim() === "" ? "a " : begun + (/[^\s(]$/.test(begun) ? " " : "");
  const after = (/^[^\s,.;:!?)]/.test(rest) ? " " : "") + rest;
  field.value = before + name + after;
  field.focus();
  field.setSelectionRange(before.length + name.length, before.length + name.length);
  keep(index, { prompt: field.value });
}

// While a name is typed, only those that it may become are offered.
function narrow(event) {
  const field = event.target;
  if (field.dataset.field !== "prompt") return;
  const begun = /<[^<>\s]*$/.exec(field.value.slice(0, field.selectionStart))?.[0] || "";
  for (const each of field.closest(".mos-row").querySelectorAll("[data-concept]")) each.hidden = !each.dataset.concept.startsWith(begun);
}

element.addEventListener("pointerdown", begin);
element.addEventListener("pointermove", go);
element.addEventListener("pointerup", end);
element.addEventListener("pointercancel", end);
element.addEventListener("keydown", press);
element.addEventListener("input", typed);
element.addEventListener("input", narrow);
element.addEventListener("change", typed);
element.addEventListener("click", clicked);
element.addEventListener("focusin", (event) => {
  const region = event.target.closest("[data-region]");
  before = null;
  if (region) select(+region.dataset.region);
});
// Gradio renders the template anew when Python sends a layout or other concepts, and with it takes out what was built.
new MutationObserver(build).observe(find(".mos-mark"), { attributes: true });
build();
