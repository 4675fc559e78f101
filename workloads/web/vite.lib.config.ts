// The client library alone, as one ES module without dependencies.
import { defineConfig } from "vite";

export default defineConfig({
  publicDir: false,
  build: {
    target: "es2022",
    outDir: "dist-lib",
    sourcemap: true,
    lib: { entry: "src/lib.ts", formats: ["es"], fileName: () => "fanlight.js" },
  },
});
