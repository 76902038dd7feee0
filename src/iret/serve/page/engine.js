// ONNX Runtime Web behind one call: an async function from inputs [{ data, dims }] in the graph's order to arrays.

const TYPES = new Map([[Float32Array, "float32"], [BigInt64Array, "int64"]]);

/** `ort` is the module, `bytes` an ONNX file. */
export async function openGraph(ort, bytes) {
  const options = { executionProviders: ["wasm"], logSeverityLevel: 3 };
  const session = await ort.InferenceSession.create(new Uint8Array(bytes), options);
  return async (inputs) => {
    const feeds = {};
    inputs.forEach(({ data, dims }, place) => {
      feeds[session.inputNames[place]] = new ort.Tensor(TYPES.get(data.constructor), data, dims);
    });
    const outputs = await session.run(feeds);
    return session.outputNames.map((name) => outputs[name].data);
  };
}
