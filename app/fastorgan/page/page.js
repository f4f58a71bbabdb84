"use strict";

// --- the table -------------------------------------------------------------------------------------------------------

const table = document.getElementById("overview");
const headings = [...table.tHead.rows[0].cells];

function keyOf(row, column) {
  const cell = row.cells[column];
  if (column === 0) return cell.textContent.trim();
  return cell.dataset.value === "" ? null : Number(cell.dataset.value);
}

function compare(a, b) {
  if (typeof a === "string") return a.localeCompare(b, undefined, { numeric: true });
  return a - b;
}

headings.forEach((heading, column) => {
  const button = heading.querySelector("button");
  button.disabled = false;
  button.addEventListener("click", () => {
    // Names begin with A, numbers with the highest.
    const first = column === 0 ? "ascending" : "descending";
    const other = column === 0 ? "descending" : "ascending";
    const order = heading.getAttribute("aria-sort") === first ? other : first;
    for (const each of headings) each.setAttribute("aria-sort", each === heading ? order : "none");
    const rows = [...table.tBodies[0].rows].map((row) => [keyOf(row, column), row]);
    const sign = order === "ascending" ? 1 : -1;
    rows.sort(([a], [b]) => {
      // What is unknown comes last in either order.
      if (a === null || b === null) return (a === null) - (b === null);
      return sign * compare(a, b);
    });
    table.tBodies[0].append(...rows.map(([, row]) => row));
  });
});

const filter = document.getElementById("filter");
filter.disabled = false;
filter.addEventListener("input", () => {
  const wanted = filter.value.trim().toLowerCase();
  let shown = 0;
  for (const row of table.tBodies[0].rows) {
    const text = `${row.cells[0].textContent} ${row.cells[row.cells.length - 1].textContent}`.toLowerCase();
    row.hidden = !text.includes(wanted);
    const link = row.querySelector("a").getAttribute("href");
    document.querySelector(link).hidden = row.hidden;
    shown += !row.hidden;
  }
  document.getElementById("shown").textContent = wanted ? `${shown} of ${table.tBodies[0].rows.length}` : "";
});

function openTarget() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  if (target && target.tagName === "DETAILS") {
    target.open = true;
    target.scrollIntoView();
  }
}
window.addEventListener("hashchange", openTarget);

// --- the viewer ------------------------------------------------------------------------------------------------------

const PLANES = ["axial", "coronal", "sagittal"];
const SIDES = [["R", "L", "A", "P"], ["R", "L", "S", "I"], ["A", "P", "S", "I"]];
const WIDTH = 900;

/** The grey values of a picture, one byte a pixel, in the order of the tiles' voxels. */
async function voxels(address, scan) {
  const picture = new Image();
  picture.src = address;
  await picture.decode();
  const canvas = document.createElement("canvas");
  canvas.width = picture.naturalWidth;
  canvas.height = picture.naturalHeight;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
  const [slices, rows, columns] = scan.shape;
  const values = new Uint8Array(slices * rows * columns);
  for (let z = 0, at = 0; z < slices; z++) {
    const top = Math.floor(z / scan.across) * rows, left = (z % scan.across) * columns;
    for (let y = 0; y < rows; y++) {
      let from = 4 * ((top + y) * canvas.width + left);
      for (let x = 0; x < columns; x++, at++, from += 4) values[at] = pixels[from];
    }
  }
  return values;
}

class Viewer {
  constructor(box) {
    this.box = box;
    this.canvas = box.querySelector("canvas");
    this.place = box.querySelector(".place");
    this.form = box.querySelector("form");
    this.scan = JSON.parse(box.querySelector("script").textContent);
    this.colours = new Map();
    for (const input of this.form.querySelectorAll("[name=organ]")) {
      const colour = getComputedStyle(input.parentElement.querySelector(".swatch")).backgroundColor;
      this.colours.set(Number(input.value), colour.match(/\d+/g).slice(0, 3).map(Number));
    }
    this.layer = document.createElement("canvas");
    this.at = [...this.scan.first];
  }

  async open() {
    [this.grey, this.codes] = await Promise.all([
      voxels(this.scan.ct, this.scan), voxels(this.scan.labels, this.scan),
    ]);
    for (let i = 0; i < this.codes.length; i++) this.codes[i] = Math.round(this.codes[i] / this.scan.code_step);
    this.form.addEventListener("input", (event) => {
      if (event.target.name === "plane") this.turn();
      else if (event.target.name === "slice") this.at[this.plane] = Number(event.target.value);
      this.draw();
    });
    this.canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.scroll(event.deltaY < 0 ? 1 : -1);
    }, { passive: false });
    this.canvas.addEventListener("keydown", (event) => {
      const steps = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 5, PageDown: -5 };
      if (!(event.key in steps)) return;
      event.preventDefault();
      this.scroll(steps[event.key]);
    });
    this.canvas.addEventListener("pointerdown", (event) => {
      this.canvas.setPointerCapture(event.pointerId);
      this.dragged = { y: event.clientY, from: this.at[this.plane] };
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (!this.dragged) return;
      const step = Math.max(3, this.canvas.clientHeight / this.scan.shape[this.plane] / 1.5);
      this.go(this.dragged.from + Math.round((this.dragged.y - event.clientY) / step));
    });
    for (const name of ["pointerup", "pointercancel"]) {
      this.canvas.addEventListener(name, () => { this.dragged = null; });
    }
    this.box.hidden = false;
    this.turn();
    this.draw();
  }

  get plane() { return Number(this.form.elements.plane.value); }

  turn() {
    const slider = this.form.elements.slice;
    slider.max = this.scan.shape[this.plane] - 1;
    slider.value = this.at[this.plane];
  }

  scroll(steps) { this.go(this.at[this.plane] + steps); }

  go(index) {
    const last = this.scan.shape[this.plane] - 1;
    this.at[this.plane] = Math.min(last, Math.max(0, index));
    this.form.elements.slice.value = this.at[this.plane];
    this.draw();
  }

  /** Width, height, and the offset of a pixel's voxel: base + down * row + across * column. */
  view() {
    const [slices, rows, columns] = this.scan.shape, index = this.at[this.plane];
    if (this.plane === 0) return [columns, rows, index * rows * columns, columns, 1];
    // The lowest slice is the first, and has to be at the bottom.
    const top = (slices - 1) * rows * columns;
    if (this.plane === 1) return [columns, slices, top + index * columns, -rows * columns, 1];
    return [rows, slices, top + index, -rows * columns, columns];
  }

  draw() {
    const [width, height, base, down, across] = this.view();
    const [mmDown, mmAcross] = [[1, 2], [0, 2], [0, 1]][this.plane].map((axis) => this.scan.spacing_mm[axis]);
    this.canvas.width = WIDTH;
    this.canvas.height = Math.max(1, Math.round(WIDTH * height * mmDown / (width * mmAcross)));
    this.layer.width = width;
    this.layer.height = height;
    const layer = this.layer.getContext("2d"), context = this.canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    const paint = (fill) => {
      const image = layer.createImageData(width, height);
      for (let y = 0, to = 0; y < height; y++) {
        for (let x = 0; x < width; x++, to += 4) fill(image.data, to, base + down * y + across * x, x, y);
      }
      layer.putImageData(image, 0, 0);
      context.drawImage(this.layer, 0, 0, this.canvas.width, this.canvas.height);
    };
    paint((data, to, voxel) => {
      data[to] = data[to + 1] = data[to + 2] = this.grey[voxel];
      data[to + 3] = 255;
    });
    const shown = new Set([...this.form.querySelectorAll("[name=organ]:checked")].map((input) => Number(input.value)));
    const opacity = Math.round(2.55 * this.form.elements.opacity.value);
    const rim = opacity === 0 ? 0 : Math.max(opacity, 200);
    paint((data, to, voxel, x, y) => {
      const code = this.codes[voxel];
      if (!shown.has(code)) return;
      const differs = (inside, step) => !inside || this.codes[voxel + step] !== code;
      const edge = differs(x > 0, -across) || differs(x < width - 1, across)
        || differs(y > 0, -down) || differs(y < height - 1, down);
      [data[to], data[to + 1], data[to + 2]] = this.colours.get(code);
      data[to + 3] = edge ? rim : opacity;
    });
    const [left, right, top, bottom] = SIDES[this.plane], w = this.canvas.width, h = this.canvas.height;
    context.fillStyle = "#eaecf0";
    context.font = "22px system-ui, sans-serif";
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.shadowColor = "#000";
    context.shadowBlur = 4;
    for (const [text, x, y] of [[left, 18, h / 2], [right, w - 18, h / 2], [top, w / 2, 18], [bottom, w / 2, h - 18]]) {
      context.fillText(text, x, y);
    }
    this.place.textContent = `${PLANES[this.plane]} ${this.at[this.plane] + 1} / ${this.scan.shape[this.plane]}`;
  }
}

for (const details of document.querySelectorAll("details.case")) {
  const box = details.querySelector(".viewer");
  if (!box) continue;
  let opened = false;
  const open = () => {
    if (!details.open || opened) return;
    opened = true;
    new Viewer(box).open().catch((error) => {
      box.replaceChildren(`The slices cannot be shown here (${error.message}).`);
      box.hidden = false;
    });
  };
  details.addEventListener("toggle", open);
  open();
}
openTarget();
