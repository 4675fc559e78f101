// Text from on-screen keyboards. They have no keys to press: the browser changes the text of a field, and what
// changed becomes text for the instance (stream-protocol section 7.7, types 1 and 2).

/** Always in the field, so that deleting backwards has something to delete. */
const FILLER = " ";

/** What the instance shall do about a change of the field. */
export type Edit = { text: string } | { backspaces: number } | { enter: true };

/** The edits that lead from the filler to `value`. Pure. */
export function editsOf(value: string): Edit[] {
  if (value === FILLER) return [];
  if (!value.startsWith(FILLER)) return value === "" ? [{ backspaces: 1 }] : [{ backspaces: 1 }, ...typed(value)];
  return typed(value.slice(FILLER.length));
}

function typed(text: string): Edit[] {
  // A new line is a key: applications take it for one, not for a character.
  return text.split("\n").flatMap((part, i): Edit[] => {
    const edits: Edit[] = i > 0 ? [{ enter: true }] : [];
    return part === "" ? edits : [...edits, { text: part }];
  });
}

/** Sends what is typed into `field`. Ends when `signal` aborts. */
export function listenToText(
  field: HTMLTextAreaElement,
  send: (type: string, data: object) => void,
  signal: AbortSignal,
): void {
  const flush = () => {
    for (const edit of editsOf(field.value)) {
      if ("text" in edit) send("input::ime-event", { type: 1, data: { text: edit.text } });
      else if ("backspaces" in edit) send("input::ime-event", { type: 2, data: { code: 67, times: edit.backspaces } });
      else for (const pressed of [true, false]) send("input::key", { code: 40, pressed });
    }
    field.value = FILLER;
    field.setSelectionRange(FILLER.length, FILLER.length);
  };
  // Half a composition is nobody's text.
  field.addEventListener("input", (event) => !(event as InputEvent).isComposing && flush(), { signal });
  field.addEventListener("compositionend", flush, { signal });
  field.addEventListener("focus", flush, { signal });
  field.value = FILLER;
}
