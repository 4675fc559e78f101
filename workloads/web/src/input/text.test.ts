import { expect, test } from "vitest";
import { editsOf } from "./text";

test.each([
  [" ", []],
  [" ä", [{ text: "ä" }]],
  [" two words", [{ text: "two words" }]],
  ["", [{ backspaces: 1 }]],
  ["x", [{ backspaces: 1 }, { text: "x" }]],
  [" \n", [{ enter: true }]],
  [" a\nb", [{ text: "a" }, { enter: true }, { text: "b" }]],
])("a field that holds %j means %j", (value, edits) => expect(editsOf(value)).toEqual(edits));
