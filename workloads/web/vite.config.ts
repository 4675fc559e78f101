// The page, served by the gateway under /ui. Nothing is inlined into the HTML and no asset becomes a
// `data:` URL, so that the page works under `default-src 'self'`.
import { defineConfig } from "vite";

export default defineConfig({
  base: "/ui/",
  build: {
    target: "es2022",
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    sourcemap: false,
  },
});
