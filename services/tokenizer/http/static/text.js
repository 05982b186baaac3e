// What a model wrote, as text that shows all of it and does nothing else.

// Control characters, marks that turn the direction of what follows, and characters without a picture. Line feeds and tabs
// are left alone, and so are the joiners that Persian and emoji are written with.
const UNSEEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\u{e0000}-\u{e007f}]/gu;

/** The text with a visible name in place of each character that could not be seen, or would move others. */
export function visible(text) {
  return text.replace(UNSEEN, (char) => {
    const code = char.codePointAt(0);
    if (code < 0x20) return String.fromCodePoint(0x2400 + code);
    return code === 0x7f ? "\u2421" : `‹U+${code.toString(16).toUpperCase().padStart(4, "0")}›`;
  });
}

const BLOCK = 8192;
const LONGEST_LINE = 65_536;

/**
 * Shows a text that grows. It is laid out in blocks, so that what is added costs the same however much is there: a block
 * ends with a line once it is long, and a line without an end after LONGEST_LINE characters.
 */
export class TextView {
  constructor(element) {
    this.element = element;
    this.text = "";
    this._block = null;
    this._length = 0;
    this._pending = [];
    this._timer = null;
  }

  append(text) {
    this.text += text;
    this._pending.push(text);
    // A frame per token would be more than an eye takes in, and a hidden tab has no frames at all.
    this._timer ??= setTimeout(() => this.flush(), 30);
  }

  flush() {
    clearTimeout(this._timer);
    this._timer = null;
    const added = this._pending.join("");
    this._pending = [];
    for (let at = 0; at < added.length; ) {
      const end = this._end(added, at);
      this._put(added.slice(at, end));
      at = end;
    }
  }

  /** Where what is added to the present block ends. */
  _end(added, at) {
    const room = Math.max(BLOCK - this._length, 0);
    if (added.length - at <= room) return added.length;
    const line = added.indexOf("\n", at + room);
    const most = at + Math.max(LONGEST_LINE - this._length, 1);
    const end = line < 0 ? added.length : line + 1;
    if (end <= most) return end;
    // Not between the halves of a character.
    return /[\udc00-\udfff]/.test(added[most] ?? "") && most > at + 1 ? most - 1 : most;
  }

  _put(text) {
    if (this._block === null) {
      this._block = document.createElement("div");
      this._block.className = "block";
      this._length = 0;
      this.element.append(this._block);
    }
    this._length += text.length;
    const is_full = (this._length >= BLOCK && text.endsWith("\n")) || this._length >= LONGEST_LINE;
    // The block is a paragraph of its own: the line feed at its end would be an empty line.
    this._block.append(visible(is_full && text.endsWith("\n") ? text.slice(0, -1) : text));
    if (is_full) this._block = null;
  }
}
