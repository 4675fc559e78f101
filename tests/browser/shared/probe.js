// Runs in the page before anything else. Looks at the pictures that a video element shows, as pixels: the barcode
// of the pattern application (its layout is told in tests/apps/src/barcode.rs), colours, and how frames come.
// Uses nothing of the page's own code, so that it proves what was decoded and not what the page believes.

(() => {
  const CELL = 16;
  const COLUMNS = 36;
  const ROWS = 6;
  const MAGIC = 0xfa91;

  const crc16 = (bytes) => {
    let crc = 0xffff;
    for (const byte of bytes) {
      crc ^= byte << 8;
      for (let bit = 0; bit < 8; bit++) crc = crc & 0x8000 ? ((crc << 1) ^ 0x1021) & 0xffff : (crc << 1) & 0xffff;
    }
    return crc;
  };

  /** Reads a barcode from the brightness of pixels; undefined where there is none. */
  function decode(luma) {
    const halves = [];
    for (let row = 0; row < ROWS; row++) {
      const bit = (column) => (luma(column * CELL + CELL / 2, row * CELL + CELL / 2) >= 128 ? 1 : 0);
      if (!bit(0) || bit(1) || !bit(COLUMNS - 1)) return undefined;
      let parity = 0;
      for (const first of [2, 18]) {
        let half = 0;
        for (let column = first; column < first + 16; column++) {
          half = (half << 1) | bit(column);
          parity ^= bit(column);
        }
        halves.push(half);
      }
      if (bit(34) !== parity) return undefined;
    }
    const bytes = halves.slice(0, 11).flatMap((half) => [half >> 8, half & 255]);
    if (halves[10] !== MAGIC || crc16(bytes) !== halves[11]) return undefined;
    return {
      clockUs: (halves[0] * 65536 + halves[1]) * 65536 + halves[2],
      frame: halves[4] * 65536 + halves[3],
      key: halves[5],
      keyPresses: halves[6],
      buttons: halves[7],
      pointer: [halves[8], halves[9]],
    };
  }

  const size = { width: COLUMNS * CELL, height: ROWS * CELL };
  let canvas;

  /** The barcode in the frame on show. Call it from a frame callback: the frame is taken at once, read a little later. */
  async function barcode(video) {
    if (video.videoWidth < size.width || video.videoHeight < size.height) return undefined;
    let frame;
    try {
      frame = new VideoFrame(video);
    } catch {
      return undefined; // No frame yet.
    }
    try {
      if (/^(I420A?|NV12)$/.test(frame.format ?? "")) {
        // The decoder's own brightness, without a detour over colours.
        const rect = { x: 0, y: 0, ...size };
        const bytes = new Uint8Array(frame.allocationSize({ rect }));
        const [plane] = await frame.copyTo(bytes, { rect });
        return decode((x, y) => bytes[plane.offset + y * plane.stride + x]);
      }
      canvas ??= new OffscreenCanvas(size.width, size.height).getContext("2d", { willReadFrequently: true });
      canvas.drawImage(frame, 0, 0, size.width, size.height, 0, 0, size.width, size.height);
      const { data } = canvas.getImageData(0, 0, size.width, size.height);
      return decode((x, y) => data[(y * size.width + x) * 4 + 1]);
    } finally {
      frame.close();
    }
  }

  /**
   * Milliseconds between the Unix clock and `performance.now()`. `Date.now()` counts whole milliseconds, so the
   * moment at which it steps is what is compared; the median of many steps is free of interruptions.
   */
  function clockOffset() {
    const offsets = [];
    for (let i = 0; i < 25; i++) {
      const before = Date.now();
      let now = before;
      let at = 0;
      while (now === before) {
        now = Date.now();
        at = performance.now();
      }
      offsets.push(now - at);
    }
    return offsets.sort((a, b) => a - b)[12];
  }

  const video = () => document.querySelector("video");

  /** Colours of points of the picture on show, `[r, g, b]` each. */
  function colours(points) {
    const element = video();
    const context = new OffscreenCanvas(element.videoWidth, element.videoHeight).getContext("2d", { willReadFrequently: true });
    context.drawImage(element, 0, 0);
    return points.map(([x, y]) => [...context.getImageData(x, y, 1, 1).data].slice(0, 3));
  }

  /** Shares of the picture by colour: the picture made small, each of its pixels tested. */
  function share(low, high, width = 64, height = 36) {
    const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
    context.drawImage(video(), 0, 0, width, height);
    const { data } = context.getImageData(0, 0, width, height);
    let inside = 0;
    for (let i = 0; i < data.length; i += 4) {
      if ([0, 1, 2].every((c) => data[i + c] >= low[c] && data[i + c] <= high[c])) inside++;
    }
    return inside / (width * height);
  }

  /** Brightest minus darkest pixel: a blank picture has nothing to tell. */
  function contrast() {
    const context = new OffscreenCanvas(160, 90).getContext("2d", { willReadFrequently: true });
    context.drawImage(video(), 0, 0, 160, 90);
    const { data } = context.getImageData(0, 0, 160, 90);
    let [low, high] = [255, 0];
    for (let i = 0; i < data.length; i += 4) {
      const value = (data[i] + data[i + 1] + data[i + 2]) / 3;
      [low, high] = [Math.min(low, value), Math.max(high, value)];
    }
    return high - low;
  }

  const statistics = async () => {
    const found = { video: {}, audio: {}, channels: { received: 0, sent: 0 } };
    (await window.fanlight.stream.peerConnection.getStats()).forEach((report) => {
      if (report.type === "inbound-rtp") {
        const { framesDecoded, framesDropped, freezeCount, totalFreezesDuration, keyFramesDecoded } = report;
        const { bytesReceived, headerBytesReceived, packetsReceived, packetsLost, nackCount, pliCount } = report;
        const { totalAudioEnergy, totalSamplesDuration, jitterBufferDelay, jitterBufferEmittedCount, totalDecodeTime } = report;
        found[report.kind] = {
          framesDecoded, framesDropped, freezeCount, totalFreezesDuration, keyFramesDecoded, totalDecodeTime,
          bytesReceived, headerBytesReceived, packetsReceived, packetsLost, nackCount, pliCount,
          totalAudioEnergy, totalSamplesDuration, jitterBufferDelay, jitterBufferEmittedCount,
        };
      }
      if (report.type === "data-channel") {
        found.channels.received += report.bytesReceived ?? 0;
        found.channels.sent += report.bytesSent ?? 0;
      }
      if (report.type === "candidate-pair" && report.nominated) found.rtt = report.currentRoundTripTime;
    });
    found.at = performance.now();
    return found;
  };

  /**
   * Watches the pattern for `ms`: every shown frame with its delay (drawn → callback) and, with `keysEvery`, a key
   * sent at random moments and how long it took until it was in a shown frame.
   */
  async function watch(ms, keysEvery = 0) {
    const element = video();
    const frames = [];
    const presses = [];
    let unreadable = 0;
    const offset = clockOffset();
    const begin = performance.now();
    const before = await statistics();
    let pending;
    // A picture that stands still has to be known before the first key changes it.
    let lastPresses = (await barcode(element))?.keyPresses;
    let running = true;
    const readings = [];
    const onFrame = (_now, metadata) => {
      if (!running) return;
      const at = performance.now();
      element.requestVideoFrameCallback(onFrame);
      readings.push(
        barcode(element).then((reading) => {
          if (!reading) {
            unreadable++;
            return;
          }
          // The clock in the picture has 48 bits; so has the difference.
          const shownUs = (at + offset) * 1000;
          const delay = (shownUs % 2 ** 48) - reading.clockUs;
          frames.push({ at, frame: reading.frame, delayMs: delay / 1000, presented: metadata.presentedFrames });
          if (pending && lastPresses !== undefined && reading.keyPresses !== lastPresses) {
            presses.push(at - pending.at);
            pending = undefined;
          }
          lastPresses = reading.keyPresses;
        }),
      );
    };
    element.requestVideoFrameCallback(onFrame);
    const until = begin + ms;
    while (performance.now() < until) {
      if (!keysEvery) {
        await new Promise((resolve) => setTimeout(resolve, Math.min(200, until - performance.now())));
        continue;
      }
      await new Promise((resolve) => setTimeout(resolve, keysEvery * (0.5 + Math.random())));
      if (pending || lastPresses === undefined) continue;
      pending = { at: performance.now() };
      window.fanlight.stream.send("input::key", { code: 4, pressed: true });
      window.fanlight.stream.send("input::key", { code: 4, pressed: false });
    }
    running = false;
    await Promise.all(readings);
    return { frames, presses, unreadable, unanswered: pending ? 1 : 0, seconds: (performance.now() - begin) / 1000, before, after: await statistics() };
  }

  window.probe = {
    barcode: () => barcode(video()),
    colours,
    share,
    contrast,
    statistics,
    watch,
    clockOffset,
    /** Frames decoded so far. */
    decoded: async () => (await statistics()).video.framesDecoded ?? 0,
    /** Where a point of the picture lies in the page. */
    place: (x, y) => {
      const element = video();
      const box = element.getBoundingClientRect();
      const scale = Math.min(box.width / element.videoWidth, box.height / element.videoHeight);
      const left = box.left + (box.width - element.videoWidth * scale) / 2;
      const top = box.top + (box.height - element.videoHeight * scale) / 2;
      return { x: left + x * scale, y: top + y * scale };
    },
    size: () => [video().videoWidth, video().videoHeight],
  };
})();
