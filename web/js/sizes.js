// Below the size of a clip: the sizes that the models were trained at, one click each, and what the chosen one costs.
// Nothing of it is saved: neither in workflows nor in prompts.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { at, framesBytes, sampled, secondsPerStep, stopwatch, tokensOf, trainedSize } from "./estimate.js";

const SIZE_NAMES = ["width", "height", "length", "batch_size"];
const STORE = "Allegro.lastRun.";
const GIB = 1024 ** 3;
// Pixels; the longest description is a warning, two short lines and one that may wrap.
const ROW = 26, LINE = 15, LINES = 6;
const STYLE = `
  .allegro-sizes { display: flex; flex-direction: column; gap: 4px; padding: 2px 4px; overflow: hidden;
    font: 11px/${LINE}px sans-serif; color: var(--descrip-text); box-sizing: border-box; }
  .allegro-sizes .choices { display: flex; flex-wrap: wrap; gap: 4px; }
  .allegro-sizes button { flex: 1 0 40%; padding: 2px 4px; cursor: pointer; font: inherit; white-space: nowrap;
    color: var(--input-text); background: var(--comfy-input-bg); border: 1px solid var(--border-color); border-radius: 6px; }
  .allegro-sizes button:hover { border-color: var(--descrip-text); }
  .allegro-sizes button[aria-pressed="true"] { border-color: #4a9eff; }
  .allegro-sizes .warning { color: #e0a030; }`;

const pickers = new Map(); // node -> function that brings its picker up to date
let texts = {};

/** What the definition of a node says about trained sizes; undefined for every node without. */
const factsOf = (node) => node.constructor.nodeData?.input?.required?.length?.[1]?.allegro_sizes;

function text(name, values = {}) {
  const language = app.extensionManager.setting.get("Comfy.Locale");
  const found = texts[language]?.allegroSizes?.[name] ?? texts.en?.allegroSizes?.[name] ?? name;
  return found.replace(/\{(\w+)\}/g, (_, key) => values[key]);
}

const number = (value, digits = 0) => value.toLocaleString(app.extensionManager.setting.get("Comfy.Locale"), {
  maximumFractionDigits: digits });
const gib = (bytes) => bytes < GIB / 10 ? text("mebibytes", { value: number(bytes / 1024 ** 2, 1) })
  : text("gibibytes", { value: number(bytes / GIB, 1) });

function duration(seconds) {
  if (seconds < 90) {
    return text("seconds", { value: number(seconds, seconds < 10 ? 1 : 0) });
  }
  const minutes = seconds / 60;
  return minutes < 90 ? text("minutes", { value: number(minutes) }) : text("hours", { value: number(minutes / 60, 1) });
}

const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);
const isLinked = (node, name) => node.inputs?.some((input) => (input.widget?.name ?? input.name) === name && input.link != null);

/** "bundled" if every transformer that the graph loads comes with this extension, else "released". */
function modelIn(graph, facts) {
  const names = (graph?.nodes ?? []).filter((node) => node.comfyClass === "LoadAllegroDiT")
    .map((node) => widgetOf(node, "model_name")?.value);
  return names.length && names.every((name) => facts.bundled.includes(name)) ? "bundled" : "released";
}

/** The steps that the samplers of the graph will take, if they agree. */
function stepsIn(graph) {
  const found = new Set((graph?.nodes ?? []).map((node) => widgetOf(node, "steps")?.value).filter(Number.isInteger));
  return found.size === 1 ? [...found][0] : undefined;
}

function lastRun(model) {
  try {
    return JSON.parse(localStorage.getItem(STORE + model)) ?? undefined;
  } catch {
    return undefined; // somebody else's value, or storage is switched off
  }
}

/** The lines below the buttons: [text, is a warning]. */
function describe(node, facts) {
  if (SIZE_NAMES.some((name) => isLinked(node, name))) {
    return [[text("linked"), false]];
  }
  const [width, height, length, batch] = SIZE_NAMES.map((name) => widgetOf(node, name)?.value);
  const size = { width, height, length, batch };
  const model = modelIn(node.graph, facts);
  const { fps } = facts.sizes.find((known) => known.model === model);
  const tokens = tokensOf(facts, size);
  const memory = at(facts.models[model].bytes, tokens);
  const lines = [];
  if (!trainedSize(facts, model, size)) {
    lines.push([text(`${model}Untrained`), true]);
  }
  lines.push([text("tokens", { tokens: number(tokens), seconds: number(length / fps, 1), fps: number(fps) }), false]);
  lines.push([text("memory", { low: gib(memory), high: gib(2 * batch * memory), frames: gib(framesBytes(size)) }), false]);
  const run = lastRun(model);
  const step = run && secondsPerStep(facts, model, size, run);
  if (step === undefined) {
    lines.push([text("unknownTime"), false]);
  } else {
    const steps = stepsIn(node.graph) ?? run.steps;
    lines.push([text("time", { step: duration(step), steps: number(steps), total: duration(steps * step) }), false]);
  }
  return lines;
}

function choose(node, size) {
  for (const name of ["width", "height", "length"]) {
    const widget = widgetOf(node, name);
    widget.value = size[name];
    widget.callback?.(widget.value, app.canvas, node);
  }
  node.setDirtyCanvas?.(true, true);
}

function build(node, facts) {
  const element = document.createElement("div");
  element.className = "allegro-sizes";
  const choices = element.appendChild(document.createElement("div"));
  choices.className = "choices";
  const buttons = facts.sizes.map((size) => {
    const button = choices.appendChild(document.createElement("button"));
    button.addEventListener("click", () => choose(node, size));
    return button;
  });
  const lines = element.appendChild(document.createElement("div"));
  const refresh = () => {
    facts.sizes.forEach((size, i) => {
      const chosen = ["width", "height", "length"].every((name) => widgetOf(node, name)?.value === size[name]);
      buttons[i].textContent = text("choice", size);
      buttons[i].title = text(size.model, size);
      buttons[i].setAttribute("aria-pressed", String(chosen));
      buttons[i].disabled = ["width", "height", "length"].some((name) => isLinked(node, name));
    });
    lines.replaceChildren(...describe(node, facts).map(([line, isWarning]) => {
      const row = document.createElement("div");
      row.textContent = line;
      row.className = isWarning ? "warning" : "";
      return row;
    }));
  };
  return { element, refresh };
}

/** Calls `then` behind a method that an object may have. */
function after(object, method, then) {
  const original = object[method];
  object[method] = function (...args) {
    const result = original?.apply(this, args);
    then();
    return result;
  };
}

function addPicker(node, facts) {
  const { element, refresh } = build(node, facts);
  const height = () => Math.ceil(facts.sizes.length / 2) * ROW + LINES * LINE;
  const widget = node.addDOMWidget("trained_sizes", "allegro_sizes", element, {
    serialize: false, hideOnZoom: false, getValue: () => "", setValue: () => {}, getMinHeight: height, getMaxHeight: height });
  widget.serialize = false;
  for (const name of SIZE_NAMES) {
    after(widgetOf(node, name), "callback", refresh);
  }
  after(node, "onConfigure", refresh);
  after(node, "onConnectionsChange", refresh);
  after(node, "onRemoved", () => pickers.delete(node));
  pickers.set(node, refresh);
  const needed = node.computeSize();
  node.setSize([Math.max(node.size[0], needed[0], 300), Math.max(node.size[1], needed[1])]);
  refresh();
}

const refreshAll = () => pickers.forEach((refresh) => refresh());

/** Keeps how long a step of the last run took, by the events that move the progress bars. */
function watchRuns(isSize, modelOf) {
  let prompt, watches;
  api.addEventListener("execution_start", async ({ detail }) => {
    prompt = undefined;
    watches = new Map();
    try {
      const queue = await (await api.fetchApi("/queue")).json();
      prompt = queue.queue_running.find(([, id]) => id === detail.prompt_id)?.[2];
    } catch {
      // the server is away, or answers something else: nothing is learned from this run
    }
  });
  api.addEventListener("progress", ({ detail: { node, value, max } }) => {
    if (!watches) {
      return; // a run that began before this page was opened
    }
    if (!watches.has(node)) {
      watches.set(node, stopwatch());
    }
    const seconds = watches.get(node)(value, performance.now() / 1000);
    const clip = value === max && seconds !== undefined && prompt && sampled(prompt, node, isSize);
    if (clip) {
      const { model, tokens } = modelOf(clip);
      try {
        localStorage.setItem(STORE + model, JSON.stringify({ tokens, batch: clip.batch, steps: max, secondsPerStep: seconds }));
      } catch {
        // storage is full or switched off: there is no estimate then
      }
      refreshAll();
    }
  });
}

const nodeFacts = {}; // node id -> what its definition says

app.registerExtension({
  name: "Allegro.Sizes",
  beforeRegisterNodeDef(nodeType, nodeData) {
    const facts = nodeData.input?.required?.length?.[1]?.allegro_sizes;
    if (facts) {
      nodeFacts[nodeData.name] = facts;
    }
  },
  async setup() {
    document.head.appendChild(document.createElement("style")).textContent = STYLE;
    watchRuns((node) => node.class_type in nodeFacts, (clip) => {
      const facts = Object.values(nodeFacts)[0];
      return { model: facts.bundled.includes(clip.name) ? "bundled" : "released", tokens: tokensOf(facts, clip) };
    });
    api.addEventListener("graphChanged", refreshAll);
    texts = await (await api.fetchApi("/i18n")).json();
    refreshAll();
  },
  nodeCreated(node) {
    const facts = factsOf(node);
    if (facts) {
      addPicker(node, facts);
    }
  },
});
