// A small curve of the last two minutes.

import { svg } from "./dom.js";

const POINTS = 120;
const WIDTH = 120, HEIGHT = 28;

export class Curve {
  constructor(name) {
    this._values = [];
    this._path = svg("path", { d: "" });
    this.element = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": `${name}, the last two minutes` }, this._path);
  }

  /** One more second. A value that is not known is a gap. */
  add(value) {
    this._values.push(value);
    if (this._values.length > POINTS) this._values.shift();
    const top = Math.max(1, ...this._values.filter((known) => known !== null));
    const first = POINTS - this._values.length;
    let path = "", is_down = false;
    this._values.forEach((known, number) => {
      if (known === null) is_down = false;
      else {
        const x = ((first + number) * WIDTH) / (POINTS - 1), y = HEIGHT - 1 - (known / top) * (HEIGHT - 2);
        path += `${is_down ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
        is_down = true;
      }
    });
    this._path.setAttribute("d", path);
  }
}
