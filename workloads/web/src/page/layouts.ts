// The keyboard layouts on offer, and a guess at which one the person has.

/** xkb name → what people call it. */
export const LAYOUTS: readonly (readonly [name: string, title: string])[] = [
  ["us", "English (US)"],
  ["gb", "English (UK)"],
  ["de", "German"],
  ["at", "German (Austria)"],
  ["ch", "German (Switzerland)"],
  ["fr", "French"],
  ["be", "Belgian"],
  ["ca", "Canadian"],
  ["es", "Spanish"],
  ["latam", "Spanish (Latin America)"],
  ["it", "Italian"],
  ["pt", "Portuguese"],
  ["br", "Portuguese (Brazil)"],
  ["nl", "Dutch"],
  ["dk", "Danish"],
  ["no", "Norwegian"],
  ["se", "Swedish"],
  ["fi", "Finnish"],
  ["pl", "Polish"],
  ["cz", "Czech"],
  ["sk", "Slovak"],
  ["hu", "Hungarian"],
  ["ro", "Romanian"],
  ["gr", "Greek"],
  ["tr", "Turkish"],
  ["ru", "Russian"],
  ["ua", "Ukrainian"],
  ["il", "Hebrew"],
  ["jp", "Japanese"],
  ["kr", "Korean"],
];

const known = (name: string): boolean => LAYOUTS.some(([layout]) => layout === name);

/** Language or region tags whose layout has another name. */
const BY_TAG: Record<string, string> = {
  "en-gb": "gb",
  en: "us",
  "de-ch": "ch",
  "de-at": "at",
  "fr-ch": "ch",
  "fr-be": "be",
  "nl-be": "be",
  "fr-ca": "ca",
  "pt-br": "br",
  "es-es": "es",
  es: "es",
  cs: "cz",
  da: "dk",
  nb: "no",
  nn: "no",
  sv: "se",
  el: "gr",
  uk: "ua",
  he: "il",
  ja: "jp",
  ko: "kr",
};

/**
 * The most likely layout. `keys` is what the browser says the keys print (`navigator.keyboard.getLayoutMap`), which
 * tells an English speaker with a German keyboard from one without; `language` is the page's best other hint.
 */
export function guessLayout(keys: { get(code: string): string | undefined } | undefined, language: string): string {
  const tag = language.toLowerCase();
  const primary = tag.split("-")[0] ?? tag;
  const byLanguage = BY_TAG[tag] ?? BY_TAG[primary] ?? (known(primary) ? primary : "us");
  const q = keys?.get("KeyQ");
  if (q === undefined) return byLanguage;
  const looks =
    q === "a" ? ["fr", "be"] : keys?.get("KeyY") === "z" ? ["de", "at", "ch", "cz", "sk", "hu"] : undefined;
  if (looks) return looks.includes(byLanguage) ? byLanguage : (looks[0] ?? byLanguage);
  // QWERTY: a language whose keyboards look otherwise is not typed on this one.
  return ["fr", "be", "de", "at", "ch"].includes(byLanguage) ? "us" : byLanguage;
}

const STORED = "fanlight.layout";

/** The layout chosen last time, else the guess. */
export async function preferredLayout(): Promise<string> {
  const stored = localStorage.getItem(STORED);
  if (stored !== null && known(stored)) return stored;
  const { keyboard } = navigator as Navigator & {
    keyboard?: { getLayoutMap?: () => Promise<{ get(code: string): string | undefined }> };
  };
  let map: { get(code: string): string | undefined } | undefined;
  try {
    map = await keyboard?.getLayoutMap?.();
  } catch {
    // Only some browsers tell, and only to a top-level page; the language has to do.
  }
  return guessLayout(map, navigator.language);
}

export function rememberLayout(layout: string): void {
  localStorage.setItem(STORED, layout);
}
