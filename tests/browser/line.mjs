// A line of the real services, and a browser. Both are started once per file of tests and ended with it.

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { readFileSync } from "node:fs";
import { mkdtemp, rm } from "node:fs/promises";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before } from "node:test";
import { promisify } from "node:util";

import { chromium } from "playwright-core";

const run = promisify(execFile);
const ROOT = new URL("../..", import.meta.url).pathname;
const SCALELLM = process.env.SCALELLM || join(ROOT, ".venv/bin/scalellm");
export const PYTHON = join(ROOT, ".venv/bin/python");
const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

/** Longest wait for anything: a bound, and no measurement. */
export const PATIENCE = 120_000;

export class Line {
  /** @param options of `scalellm up`. `keys`: the tokenizer asks for keys; this.key is an admin's. */
  static async start(options, { keys = false, env = {} } = {}) {
    const line = new Line();
    line.folder = await mkdtemp(join(tmpdir(), "scalellm-browser-"));
    line.instance = `browser-${process.pid}`;
    line.env = { ...process.env, ...env };
    if (keys) {
      const file = join(line.folder, "keys.toml");
      line.key = (await line.scalellm("keys", "create", "--tenant", "ops", "--admin", "--file", file)).trim().split(/\s+/).at(-1);
      line.userKey = (await line.scalellm("keys", "create", "--tenant", "acme", "--file", file)).trim().split(/\s+/).at(-1);
      line.env.SCALELLM_TOKENIZER_API_KEYS = file;
      line.env.SCALELLM_API_KEY = line.key;
    }
    await line.scalellm("up", "--port", "0", ...options);
    line.base = `http://${(await line.status()).http_address}`;
    return line;
  }

  async scalellm(...words) {
    const { stdout } = await run(SCALELLM, ["--instance", this.instance, ...words], { env: this.env, cwd: ROOT });
    return stdout;
  }

  async status() {
    try {
      return JSON.parse(await this.scalellm("status", "--json"));
    } catch (error) {
      if (error.stdout) return JSON.parse(error.stdout); // not healthy, which it says by its exit code
      throw error;
    }
  }

  /** Returns a function that kills a service's process as the kernel would; the supervisor starts the service again. */
  async killerOf(name) {
    const { pid } = (await this.status()).services.find((one) => one.name === name);
    return () => process.kill(pid, "SIGKILL");
  }

  /** Ask for a completion of so many tokens. Returns the number of its tokens. */
  async complete(maxTokens, fields = {}) {
    const answer = await fetch(`${this.base}/v1/completions`, {
      method: "POST",
      headers: { "content-type": "application/json", authorization: `Bearer ${this.key}` },
      body: JSON.stringify({ prompt: "Once upon a time", max_tokens: maxTokens, ignore_eos: true, ...fields }),
    });
    assert.equal(answer.status, 200);
    return (await answer.json()).usage.completion_tokens;
  }

  async stop() {
    await this.scalellm("down").catch(() => {});
    await rm(this.folder, { recursive: true, force: true });
  }
}

/**
 * For a file of tests: a line with API keys, whose engine draws random tokens, and a browser. Steps take milliseconds, so
 * that there is time to stop an answer, to reload the page and to kill services while it is written.
 *
 * @param more Options of `scalellm up` besides.
 * @returns An object that has `line` and `browser` while tests run, and opens pages of the line.
 */
export function fakeLine(...more) {
  const stage = {
    open: (path, options = {}) => open(stage.browser, `${stage.line.base}${path}`, { key: stage.line.key, ...options }),
    close: (page) => close(page, stage.line.base),
  };
  before(async () => {
    const env = { SCALELLM_EXECUTOR_FAKE_PRESET: "h200-llama-8b" };
    stage.line = await Line.start(["--executor", "fake", ...more], { keys: true, env });
    stage.browser = await launch();
  });
  after(async () => {
    await stage.browser?.close();
    await stage.line?.stop();
  });
  return stage;
}

export async function launch() {
  const executablePath = process.env.CHROMIUM || "/usr/bin/chromium";
  return chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-dev-shm-usage"] });
}

/** A page in a tab of its own that fails on errors of scripts and of the policy. */
export async function open(browser, url, { key, width = 1280, height = 900, ...options } = {}) {
  const context = await browser.newContext({ viewport: { width, height }, ...options });
  context.setDefaultTimeout(PATIENCE);
  if (key) await context.addInitScript((value) => sessionStorage.getItem("scalellm.key") ?? sessionStorage.setItem("scalellm.key", value), key);
  const page = await context.newPage();
  page.errors = [];
  page.on("pageerror", (error) => page.errors.push(error.message));
  page.on("console", (message) => {
    // What the network says of refusals and lost servers is a part of some tests.
    if (message.type() === "error" && !/Failed to load resource|net::/.test(message.text())) page.errors.push(message.text());
  });
  page.requests = [];
  page.on("request", (request) => page.requests.push(request.url()));
  await page.goto(url);
  return page;
}

/** Close a page. Fails if a script of it failed, or if it made requests to other servers. */
export async function close(page, base) {
  assert.deepEqual(page.errors, []);
  assert.deepEqual(page.requests.filter((url) => !url.startsWith(base)), []);
  await page.context().close();
}

/** Resources that a page holds after a garbage collection: bytes of its heap, and nodes of its documents, detached ones too. */
export async function held(page) {
  const session = await page.context().newCDPSession(page);
  try {
    await session.send("HeapProfiler.collectGarbage");
    const { usedSize } = await session.send("Runtime.getHeapUsage");
    const { nodes } = await session.send("Memory.getDOMCounters");
    return { usedSize, nodes };
  } finally {
    await session.detach();
  }
}

/** The violations that axe finds, in a few words each. */
export async function violations(page) {
  // As Playwright's own isolated world would not: the policy refuses what is added as a script's text.
  return page.evaluate(`${AXE}; axe.run({ resultTypes: ["violations"] }).then((found) =>
    found.violations.map((one) => one.id + ": " + one.nodes.map((node) => node.target.join(" ")).join(", ")))`);
}

export async function hasNoSidewaysScrolling(page) {
  return page.evaluate(() => document.documentElement.scrollWidth <= document.documentElement.clientWidth);
}
