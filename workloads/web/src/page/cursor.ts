// Shows the application's cursor as the cursor of the page.

import type { Cursor } from "../stream";

/** Cursor names that CSS knows; others fall back to the arrow. */
const NAMES = new Set(
  (
    "default context-menu help pointer progress wait cell crosshair text vertical-text alias copy move no-drop " +
    "not-allowed grab grabbing e-resize n-resize ne-resize nw-resize s-resize se-resize sw-resize w-resize ew-resize " +
    "ns-resize nesw-resize nwse-resize col-resize row-resize all-scroll zoom-in zoom-out none"
  ).split(" "),
);

/** Browsers show no larger cursors. */
const MAX_SIDE = 128;

/**
 * The CSS value for a cursor. `scale` is displayed size ÷ picture size: a picture that is shown smaller gets a
 * smaller cursor, with the same spot under it.
 */
export async function cssCursor(cursor: Cursor, scale: number): Promise<string> {
  if (cursor.kind === "hidden") return "none";
  if (cursor.kind === "named") return NAMES.has(cursor.name) ? cursor.name : "default";
  const { data, hotX, hotY } = cursor;
  const source =
    "png" in data
      ? await createImageBitmap(new Blob([data.png as Uint8Array<ArrayBuffer>], { type: "image/png" }))
      : await createImageBitmap(new ImageData(data.rgba as Uint8ClampedArray<ArrayBuffer>, cursor.width, cursor.height));
  const fit = Math.min(scale > 0 ? scale : 1, MAX_SIDE / cursor.width, MAX_SIDE / cursor.height);
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(cursor.width * fit));
  canvas.height = Math.max(1, Math.round(cursor.height * fit));
  canvas.getContext("2d")?.drawImage(source, 0, 0, canvas.width, canvas.height);
  source.close();
  const spot = (at: number, side: number) => Math.max(0, Math.min(side - 1, Math.round(at * fit)));
  return `url(${canvas.toDataURL()}) ${spot(hotX, canvas.width)} ${spot(hotY, canvas.height)}, default`;
}
