// Runs the script of the server's page with the few parts of a browser that it uses, and prints what a user would see.
// node page_shim.js PAGE URL
const fs = require("fs"), vm = require("vm");
const [, , file, base] = process.argv;
const script = fs.readFileSync(file, "utf8").match(/<script>([\s\S]*?)<\/script>/)[1];

class Element {
  children = []; kept = {}; value = ""; textContent = ""; className = ""; listeners = {}; attributes = {};
  setAttribute(name, value) { this.attributes[name] = value; }
  style = { setProperty: (name, value) => { this.kept[name] = value; } };
  append(...more) { this.children.push(...more); }
  replaceChildren() { this.children = []; }
  addEventListener(name, listener) { this.listeners[name] = listener; }
  focus() {}
}

const elements = {};
const $ = id => elements[id] ??= new Element();
const context = vm.createContext({
  document: { getElementById: $, createElement: () => new Element() }, performance, AbortController, TextDecoderStream, setTimeout,
  fetch: (path, options) => fetch(`${base}/${path}`, options),
});
vm.runInContext(script, context);

const until = async done => { while (!done()) await new Promise(wake => setTimeout(wake, 5)); };
const sent = async (text, limit) => {
  $("text").value = text;
  $("limit").value = limit;
  $("form").listeners.submit({ preventDefault() {} });
};

(async () => {
  await until(() => $("model").textContent);
  await sent("hello", "40");
  await until(() => !$("send").disabled);
  const runs = $("chat").children[1].children.map(run => [run.textContent, run.kept["--kept"], run.className]);
  const first = { model: $("model").textContent, state: $("state").textContent, facts: $("facts").textContent, runs };
  await sent("again", "99999");
  await until(() => !$("send").disabled);
  const error = $("chat").children.at(-1);
  await sent("stop this", "150");
  await until(() => $("chat").children.at(-1).children.length > 2);
  $("stop").listeners.click();
  await until(() => !$("send").disabled);
  const stopped = $("chat").children.at(-1);
  console.log(JSON.stringify({ ...first, error: [error.className, error.textContent], stopped: stopped.className }));
})();
