// From positions in the page to positions in the picture (stream-protocol section 6). Pure.

export interface Box {
  left: number;
  top: number;
  width: number;
  height: number;
}

export interface Size {
  width: number;
  height: number;
}

export interface Point {
  x: number;
  y: number;
}

/** Where a picture of size `picture` lies inside `box` when it is shown whole and centred (object-fit: contain). */
export function contained(box: Box, picture: Size): Box {
  if (picture.width <= 0 || picture.height <= 0 || box.width <= 0 || box.height <= 0) {
    return { left: box.left, top: box.top, width: 0, height: 0 };
  }
  const scale = Math.min(box.width / picture.width, box.height / picture.height);
  const width = picture.width * scale;
  const height = picture.height * scale;
  return { left: box.left + (box.width - width) / 2, top: box.top + (box.height - height) / 2, width, height };
}

/** Displayed size ÷ picture size; 0 while there is no picture. */
export function scaleOf(box: Box, picture: Size): number {
  return picture.width <= 0 ? 0 : contained(box, picture).width / picture.width;
}

export interface Mapped extends Point {
  /** Whether the position lies inside the picture, not on the bars beside it. */
  inside: boolean;
}

/** A position of the page in pixels of the picture, clamped to the last pixel. Nothing while there is no picture. */
export function toPicture(client: Point, box: Box, picture: Size): Mapped | undefined {
  const shown = contained(box, picture);
  if (shown.width === 0) return undefined;
  const x = ((client.x - shown.left) * picture.width) / shown.width;
  const y = ((client.y - shown.top) * picture.height) / shown.height;
  const inside = x >= 0 && y >= 0 && x < picture.width && y < picture.height;
  return { x: clamp(x, picture.width - 1), y: clamp(y, picture.height - 1), inside };
}

function clamp(value: number, max: number): number {
  return Math.min(Math.max(value, 0), max);
}

/** Turns relative movement of the page into whole pixels of the picture and keeps the rest for the next time. */
export class RelativeMotion {
  #x = 0;
  #y = 0;

  add(dx: number, dy: number, scale: number): Point {
    if (scale > 0) {
      this.#x += dx / scale;
      this.#y += dy / scale;
    }
    const whole = { x: Math.trunc(this.#x), y: Math.trunc(this.#y) };
    this.#x -= whole.x;
    this.#y -= whole.y;
    // `+ 0` turns -0 into 0, which JSON would keep apart.
    return { x: whole.x + 0, y: whole.y + 0 };
  }
}
