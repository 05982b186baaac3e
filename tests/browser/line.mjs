// A line of the real services, and a browser. Both are started once per file of tests and ended with it.

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { readFileSync } from "node:fs";
import { mkdtemp, rm } from "node:fs/promises";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";

import { chromium } from "playwright-core";

const run = promisify(execFile);
const ROOT = new URL("../..", import.meta.url).pathname;
const SCALELLM = process.env.SCALELLM || join(ROOT, ".venv/bin/scalellm");
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

  async stop() {
    await this.scalellm("down").catch(() => {});
    await rm(this.folder, { recursive: true, force: true });
  }
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

/** Close a page that made no mistakes and asked nothing of others. */
export async function close(page, base) {
  assert.deepEqual(page.errors, []);
  assert.deepEqual(page.requests.filter((url) => !url.startsWith(base)), []);
  await page.context().close();
}

/** What axe finds wrong, in a few words each. */
export async function violations(page) {
  // As Playwright's own isolated world would not: the policy refuses what is added as a script's text.
  return page.evaluate(`${AXE}; axe.run({ resultTypes: ["violations"] }).then((found) =>
    found.violations.map((one) => one.id + ": " + one.nodes.map((node) => node.target.join(" ")).join(", ")))`);
}

export async function hasNoSidewaysScrolling(page) {
  return page.evaluate(() => document.documentElement.scrollWidth <= document.documentElement.clientWidth);
}
