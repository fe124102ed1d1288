// What a clip costs: the same formulas as in Python, from the numbers that the node's definition brings.
// Nothing here knows the page.

/** Tokens of one clip. `facts` is what `trained_sizes` in Python returns, `size` has width, height and length. */
export function tokensOf(facts, { width, height, length }) {
  return Math.floor(length / facts.frames) * Math.ceil(width / facts.pixels) * Math.ceil(height / facts.pixels);
}

/** A polynomial [c0, c1, c2] at n. */
export function at([c0, c1, c2], n) {
  return c0 + c1 * n + c2 * n * n;
}

/** Bytes of the finished frames: red, green and blue as 32-bit numbers. */
export function framesBytes({ width, height, length, batch = 1 }) {
  return batch * width * height * length * 3 * 4;
}

// Beyond this ratio of their arithmetic one run says little about another: in short steps other things take the time.
// The released sizes are within a factor of 40.
const COMPARABLE = 100;

/**
 * Seconds of a step at `size`, from a measured run {tokens, batch, secondsPerStep} of the same model; undefined if that
 * was of quite another size.
 */
export function secondsPerStep(facts, model, size, run) {
  const { flops } = facts.models[model];
  const ratio = (size.batch * at(flops, tokensOf(facts, size))) / (run.batch * at(flops, run.tokens));
  return Math.max(ratio, 1 / ratio) > COMPARABLE ? undefined : run.secondsPerStep * ratio;
}

/** The trained size that `size` is, or undefined. */
export function trainedSize(facts, model, size) {
  return facts.sizes.find((known) => known.model === model
    && ["width", "height", "length"].every((name) => known[name] === size[name]));
}

/**
 * The nodes that a node of a prompt in API form depends on, nearest first, itself included.
 * A link is [node id, output].
 */
export function upstream(prompt, id) {
  const found = [String(id)];
  for (const key of found) {
    for (const value of Object.values(prompt[key]?.inputs ?? {})) {
      if (Array.isArray(value) && value[0] in prompt && !found.includes(String(value[0]))) {
        found.push(String(value[0]));
      }
    }
  }
  return found.map((key) => prompt[key]).filter(Boolean);
}

/**
 * What a sampler of a prompt works on: {width, height, length, batch, model name}; undefined if it is no sampler or the
 * prompt does not tell. `isSize(node)` says whether a node states the size of the clip.
 */
export function sampled(prompt, id, isSize) {
  if (!("latent_image" in (prompt[id]?.inputs ?? {}))) {
    return undefined;
  }
  const nodes = upstream(prompt, id);
  const size = nodes.find(isSize)?.inputs;
  const loader = nodes.find((node) => node.class_type === "LoadAllegroDiT");
  if (!loader || ![size?.width, size?.height, size?.length, size?.batch_size].every(Number.isInteger)) {
    return undefined;
  }
  const { width, height, length, batch_size: batch } = size;
  return { width, height, length, batch, name: loader.inputs.model_name };
}

/** Collects the steps of a run: call it with each step's number and time in seconds, it returns seconds per step. */
export function stopwatch() {
  let first;
  return (step, now) => {
    if (first === undefined || step <= first.step) {
      first = { step, now };
      return undefined;
    }
    return (now - first.now) / (step - first.step);
  };
}
