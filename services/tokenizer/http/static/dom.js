// Elements made of text. Nothing in these pages parses HTML: what a model or a server says can only become a text node.

/**
 * Make an element. `attributes` that are functions are listeners (onclick: f), true is an attribute without a value,
 * false and undefined are left out. Children are elements and texts; null is left out.
 */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** The same for SVG. */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** The element with an id, which has to be there. */
export function byId(id) {
  const element = document.getElementById(id);
  if (element === null) throw new Error(`there is no element #${id}`);
  return element;
}

/** Show a text in an element, which is touched only where the text is another one. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
