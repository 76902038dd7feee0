// ONNX Runtime Web behind one call: an async function from inputs [{ data, dims }] in the graph's order to arrays.

const TYPES = new Map([[Float32Array, "float32"], [BigInt64Array, "int64"]]);

/** `ort` is the module, `bytes` the Uint8Array of an ONNX file, `externalData` of those it reads weights from, [{ path, data }].
 * What the engine throws becomes a sentence. */
export async function openGraph(ort, bytes, externalData = []) {
  const options = { executionProviders: ["wasm"], logSeverityLevel: 3, externalData };
  const session = await said("could not open the model", () => ort.InferenceSession.create(bytes, options));
  return async (inputs) => {
    const feeds = {};
    inputs.forEach(({ data, dims }, place) => {
      feeds[session.inputNames[place]] = new ort.Tensor(TYPES.get(data.constructor), data, dims);
    });
    const outputs = await said("failed on this photo", () => session.run(feeds));
    return session.outputNames.map((name) => outputs[name].data);
  };
}

/** WebAssembly throws bare numbers, as where it has no memory left. */
async function said(what, work) {
  try {
    return await work();
  } catch (error) {
    throw new Error(`The engine ${what} (${error?.message ?? error}); load the page again.`);
  }
}
