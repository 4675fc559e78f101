// Watches the frames of a video element: counts them, measures them, and says when the first one came that is
// not blank. A frame of one colour is what a display shows before the application draws.

/** Whether the RGBA pixels show more than one colour. `tolerance` absorbs what compression does to a flat area. */
export function isBlank(rgba: Uint8ClampedArray, tolerance = 12): boolean {
  let low = [255, 255, 255];
  let high = [0, 0, 0];
  for (let i = 0; i + 3 < rgba.length; i += 4) {
    for (let c = 0; c < 3; c++) {
      const value = rgba[i + c] ?? 0;
      if (value < (low[c] ?? 0)) low[c] = value;
      if (value > (high[c] ?? 0)) high[c] = value;
    }
  }
  return high.every((value, c) => value - (low[c] ?? 0) <= tolerance);
}

export interface FrameEvents {
  /** Every displayed frame; `now` is when the page's rendering of it began, on the display's clock. */
  frame: (metadata: VideoFrameCallbackMetadata, now: number) => void;
  /** The first decoded frame, blank or not. */
  decoded: () => void;
  /** The first frame that is not blank. */
  shown: () => void;
}

/** Small enough to read back at every frame, large enough that a single line of text leaves a trace. */
const SAMPLE = { width: 160, height: 90 };

/** Calls back until the returned function is called. */
export function watchFrames(video: HTMLVideoElement, events: FrameEvents): () => void {
  if (!("requestVideoFrameCallback" in video)) {
    // An old browser tells nothing about frames, only that there is one.
    const element: HTMLVideoElement = video;
    const loaded = () => {
      events.decoded();
      events.shown();
    };
    element.addEventListener("loadeddata", loaded, { once: true });
    return () => element.removeEventListener("loadeddata", loaded);
  }
  let handle = 0;
  let stopped = false;
  let decoded = false;
  let canvas: CanvasRenderingContext2D | null | undefined;
  let waiting = true;
  const next = () => {
    handle = video.requestVideoFrameCallback((now, metadata) => {
      if (stopped) return;
      next();
      if (!decoded) {
        decoded = true;
        events.decoded();
      }
      events.frame(metadata, now);
      if (!waiting) return;
      if (canvas === undefined) {
        const element = document.createElement("canvas");
        element.width = SAMPLE.width;
        element.height = SAMPLE.height;
        canvas = element.getContext("2d", { willReadFrequently: true });
        if (canvas) canvas.imageSmoothingQuality = "medium";
      }
      // Without a canvas nothing can be said about the pixels; a decoded frame has to do.
      canvas?.drawImage(video, 0, 0, SAMPLE.width, SAMPLE.height);
      if (canvas && isBlank(canvas.getImageData(0, 0, SAMPLE.width, SAMPLE.height).data)) return;
      waiting = false;
      canvas = null;
      events.shown();
    });
  };
  next();
  return () => {
    stopped = true;
    video.cancelVideoFrameCallback(handle);
  };
}
