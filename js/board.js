// The drawing board: a canvas with as many pixels as the models see, a picture below and one shape that can be dragged.
export const SHAPES = { // paths of radius 1, as `SHAPES` of data/shapes.py has them
  disc: (c) => c.arc(0, 0, 1, 0, 2 * Math.PI),
  ring: (c) => { c.arc(0, 0, 1.25, 0, 2 * Math.PI); c.moveTo(0.75, 0); c.arc(0, 0, 0.75, 0, 2 * Math.PI, true); },
  square: (c) => c.rect(-0.886, -0.886, 1.772, 1.772),
  triangle: (c) => { c.moveTo(0, -1.554); c.lineTo(1.346, 0.777); c.lineTo(-1.346, 0.777); c.closePath(); },
  cross: (c) => { c.rect(-0.396, -1.189, 0.792, 2.378); c.rect(-1.189, -0.396, 2.378, 0.792); },
};

export class Board {
  constructor(canvas, { size: [height, width], paper, pencil, detail, patch }, changed) {
    Object.assign(this, { canvas, height, width, paper, detail, patch, changed, color: pencil, tool: 'draw' });
    Object.assign(this, { kind: 'ring', radius: 0.2, thing: null, history: [], cursor: [width / 2, height / 2] });
    [canvas.width, canvas.height] = [width, height];
    this.base = Object.assign(document.createElement('canvas'), { width, height });
    this.blank();
    canvas.addEventListener('pointerdown', (e) => this.down(e));
    canvas.addEventListener('pointermove', (e) => this.move(e));
    for (const end of ['pointerup', 'pointercancel']) canvas.addEventListener(end, () => { this.last = null; });
    canvas.addEventListener('keydown', (e) => this.key(e));
    for (const name of ['focus', 'blur']) canvas.addEventListener(name, () => this.draw());
  }

  get side() { return Math.min(this.height, this.width); }

  place(e) { // of a pointer, in the picture's pixels
    const box = this.canvas.getBoundingClientRect();
    return [(e.clientX - box.left) / box.width * this.width, (e.clientY - box.top) / box.height * this.height];
  }

  down(e) {
    this.canvas.setPointerCapture(e.pointerId);
    this.pointer = true;
    this.remember();
    this.last = this.cursor = this.place(e);
    this.use(this.last, this.last);
  }

  move(e) {
    if (!this.last) return;
    const now = this.place(e);
    this.use(this.last, now);
    this.last = this.cursor = now;
  }

  key(e) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[e.key];
    if (!step && e.key !== ' ') return;
    e.preventDefault();
    this.pointer = false;
    const from = this.cursor, by = this.side / 32;
    if (step) {
      const within = (v, n) => Math.min(Math.max(v, 0), n - 1);
      this.cursor = [within(from[0] + step[0] * by, this.width), within(from[1] + step[1] * by, this.height)];
      if (this.tool === 'shape' && this.thing) this.use(from, this.cursor); else this.draw();
    } else {
      this.remember();
      this.use(from, from);
    }
  }

  use(from, to) { // the tool, along a way
    if (this.tool === 'shape') this.thing = { kind: this.kind, color: this.color, radius: this.radius, at: to };
    else {
      this.settle();
      if (this.tool === 'rub') this.rub(to); else this.stroke(from, to);
    }
    this.show();
  }

  stroke(from, to) {
    const c = this.base.getContext('2d');
    Object.assign(c, { strokeStyle: this.color, lineWidth: this.side * (this.detail ? 0.14 : 0.09), lineCap: 'round' });
    c.beginPath();
    c.moveTo(...from);
    c.lineTo(to[0] + 0.01, to[1]);
    c.stroke();
  }

  rub([x, y]) { // one patch: a square of the picture's grid
    const c = this.base.getContext('2d'), p = this.patch;
    c.fillStyle = this.paper;
    c.fillRect(Math.floor(x / p) * p, Math.floor(y / p) * p, p, p);
  }

  paint(c) { // the shape
    const { at, radius, kind, color } = this.thing;
    c.save();
    c.translate(...at);
    c.scale(radius * this.side, radius * this.side);
    c.fillStyle = color;
    c.beginPath();
    SHAPES[kind](c);
    c.fill();
    c.restore();
  }

  settle() { // the shape becomes part of the picture
    if (this.thing) this.paint(this.base.getContext('2d'));
    this.thing = null;
  }

  remember() {
    const pixels = this.base.getContext('2d').getImageData(0, 0, this.width, this.height);
    this.history.push([pixels, this.thing]);
    if (this.history.length > 30) this.history.shift();
  }

  undo() {
    if (!this.history.length) return;
    const [pixels, thing] = this.history.pop();
    this.base.getContext('2d').putImageData(pixels, 0, 0);
    this.thing = thing;
    this.show();
  }

  blank() {
    const c = this.base.getContext('2d');
    c.fillStyle = this.paper;
    c.fillRect(0, 0, this.width, this.height);
    this.thing = null;
  }

  clear() {
    this.remember();
    this.blank();
    this.show();
  }

  picture(image, keep = true) { // as large as fits over the whole board; keep: it can be undone
    if (keep) this.remember();
    const [width, height] = [image.videoWidth ?? image.width, image.videoHeight ?? image.height];
    const scale = Math.max(this.width / width, this.height / height);
    const [w, h] = [width * scale, height * scale], c = this.base.getContext('2d');
    c.drawImage(image, (this.width - w) / 2, (this.height - h) / 2, w, h);
    this.thing = null;
    this.show();
  }

  show() {
    this.draw();
    this.changed();
  }

  draw() { // what the reader sees: also where the keys are
    const c = this.canvas.getContext('2d');
    c.drawImage(this.base, 0, 0);
    if (this.thing) this.paint(c);
    if (this.canvas.getRootNode().activeElement !== this.canvas || this.pointer) return;
    const [x, y] = this.cursor.map(Math.round), s = this.side / 16;
    for (const [color, width] of [['#000', 3], ['#fff', 1]]) {
      Object.assign(c, { strokeStyle: color, lineWidth: width });
      c.strokeRect(x - s / 2, y - s / 2, s, s);
    }
  }

  pixels() { // what the models see: RGBA, without the cursor
    const own = Object.assign(document.createElement('canvas'), { width: this.width, height: this.height });
    const c = own.getContext('2d', { willReadFrequently: true });
    c.drawImage(this.base, 0, 0);
    if (this.thing) this.paint(c);
    if (this.detail) { // as coarse as the pictures of the training
      const few = Object.assign(document.createElement('canvas'), { width: this.detail, height: this.detail });
      const f = few.getContext('2d');
      f.imageSmoothingQuality = 'high';
      f.drawImage(own, 0, 0, this.detail, this.detail);
      c.drawImage(few, 0, 0, this.width, this.height);
    }
    return c.getImageData(0, 0, this.width, this.height).data;
  }
}
