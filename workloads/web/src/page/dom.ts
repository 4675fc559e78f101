// Small help for building the page: elements without a framework, and without HTML from strings.

type Child = Node | string | undefined;

type Props<Element> = Partial<Omit<Element, "style" | "dataset" | "classList">> & {
  class?: string;
  data?: Record<string, string>;
  aria?: Record<string, string>;
  onclick?: (event: MouseEvent) => void;
};

/** An element with properties and children. Strings become text, never markup. */
export function h<Tag extends keyof HTMLElementTagNameMap>(
  tag: Tag,
  props: Props<HTMLElementTagNameMap[Tag]> = {},
  ...children: Child[]
): HTMLElementTagNameMap[Tag] {
  const element = document.createElement(tag);
  const { class: className, data, aria, ...rest } = props;
  if (className !== undefined) element.className = className;
  Object.assign(element, rest);
  for (const [name, value] of Object.entries(data ?? {})) element.dataset[name] = value;
  for (const [name, value] of Object.entries(aria ?? {})) element.setAttribute(`aria-${name}`, value);
  element.append(...children.filter((child) => child !== undefined));
  return element;
}

/** A button that shows its work: disabled while the promise of `action` is under way. */
export function button(label: string, className: string, action: () => void | Promise<void>, title = label): HTMLButtonElement {
  const element = h("button", { class: className, type: "button", title }, label);
  element.addEventListener("click", async () => {
    element.disabled = true;
    try {
      await action();
    } finally {
      element.disabled = false;
    }
  });
  return element;
}

/** What a view gives back to the router. */
export interface View {
  element: HTMLElement;
  title: string;
  /** Ends timers, listeners, streams. */
  dispose(): void;
}
