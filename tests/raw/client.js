// Runs in the page. Speaks the protocol by hand the way the original's browser SDK does, with its habits: it
// begins with `discover`, closes the socket as soon as ICE is connected, has no close handler, waits 10 s after
// `disconnected`, and knows the end of a stream only by the error of the control channel.
//
// `window.raw` is driven from outside. Everything that happens is an event in `events`, which tests wait for.

(() => {
  const clients = [];

  const text = (data) => JSON.stringify(data);

  class Client {
    constructor(options) {
      this.options = { apiVersion: 2, audio: true, video: true, channels: [], ...options };
      this.events = [];
      this.waiters = [];
      this.pending = [];
      this.channels = {};
      this.over = false;
    }

    say(kind, more = {}) {
      const event = { kind, at: Math.round(performance.now()), ...more };
      this.events.push(event);
      this.waiters = this.waiters.filter((waiter) => !waiter(event));
    }

    /** Resolves with the first event of `kind`, past or to come; fails with everything that happened instead. */
    wait(kind, ms, skip = 0) {
      const matches = () => this.events.filter((event) => event.kind === kind)[skip];
      return new Promise((resolve, reject) => {
        const found = matches();
        if (found) return resolve(found);
        const timer = setTimeout(() => {
          const log = this.events.map(({ kind, at, ...more }) => `${kind}${Object.keys(more).length ? " " + text(more) : ""}`);
          reject(new Error(`no "${kind}" within ${ms} ms; there was: ${log.join(", ") || "nothing"}`));
        }, ms);
        this.waiters.push(() => {
          const event = matches();
          if (!event) return false;
          clearTimeout(timer);
          resolve(event);
          return true;
        });
      });
    }

    fail(code, message) {
      if (this.over) return;
      this.say("error", { code, message });
      this.stop();
    }

    stop() {
      this.over = true;
      clearTimeout(this.lost);
      this.socket?.close();
      this.pc?.close();
      this.say("done");
    }

    send(message) {
      if (this.socket.readyState === WebSocket.OPEN) this.socket.send(typeof message === "string" ? message : text(message));
    }

    start() {
      this.socket = new WebSocket(this.options.url);
      this.socket.binaryType = "arraybuffer";
      this.socket.onopen = () => this.opened();
      this.socket.onmessage = ({ data }) => this.received(data);
      this.socket.onerror = () => this.fail(2, "failed to connect to the signalling socket");
      // Only written down: the SDK does not notice.
      this.socket.onclose = ({ code, reason }) => this.say("closed", { code, reason });
    }

    opened() {
      this.say("opened");
      this.pc = new RTCPeerConnection({
        iceServers: this.options.stunServers.map(({ urls, username, password }) => ({ urls, username, credential: password })),
      });
      this.pc.onicecandidate = ({ candidate }) => this.candidateMade(candidate);
      this.pc.oniceconnectionstatechange = () => this.iceChanged();
      this.pc.onconnectionstatechange = () => this.say(`connection:${this.pc.connectionState}`);
      this.pc.ontrack = ({ track, streams }) => this.trackCame(track, streams[0]);
      for (const label of ["control", ...this.options.channels]) this.open(label);
      for (const odd of this.options.first ?? []) {
        if (odd.binary) this.socket.send(new Uint8Array(odd.binary));
        else if (odd.large) this.send("x".repeat(odd.large));
        else this.send(odd.text);
      }
      if (this.options.mute) return;
      if (this.options.skip?.includes("discover")) this.settle();
      else this.send({ type: "discover" });
    }

    open(label) {
      const channel = this.pc.createDataChannel(label);
      this.channels[label] = channel;
      channel.onopen = () => this.say(`open:${label}`);
      channel.onmessage = ({ data }) => this.say(`message:${label}`, { data: typeof data === "string" ? data : "binary" });
      channel.onclose = () => this.say(`gone:${label}`);
      channel.onerror = ({ error }) => {
        if (label !== "control") return;
        if (error.sctpCauseCode === 12) this.fail(14, error.message);
        else this.fail(13, `${error.message} (cause ${error.sctpCauseCode})`);
      };
    }

    received(data) {
      if (this.over) return;
      if (typeof data !== "string") return this.say("binary");
      let message;
      try {
        message = JSON.parse(data);
      } catch {
        return this.say("not-json", { data: data.slice(0, 80) });
      }
      this.say(`got:${message.type}`, { message: ["offer", "answer", "candidate"].includes(message.type) ? undefined : message });
      switch (message.type) {
        case "resp:discover":
          if (message.max_api_version < this.options.apiVersion) return this.fail(1, "the server's API version is too low");
          return this.settle();
        case "offer":
          this.offer = atob(message.sdp);
          return this.answer();
        case "answer":
          return this.describe({ type: "answer", sdp: atob(message.sdp) });
        case "candidate":
          return this.candidateCame(message);
        case "error":
          // SDKs 1.18 to 1.21 went on with version 1 after code 5; where a case wants that, it says so.
          if (this.options.tolerate?.includes(message.code)) return;
          return this.fail(2, message.message);
      }
    }

    settle() {
      const { apiVersion, audio, video, microphone, camera, codecs, skip } = this.options;
      if (!skip?.includes("settings")) {
        const settings = { type: "settings", api_version: this.options.claimVersion ?? apiVersion };
        if (apiVersion >= 2) {
          settings.data_channels = this.options.channels;
          settings.enable_speaker = audio;
          settings.enable_microphone = microphone ?? false;
          settings.enable_video = video;
          settings.enable_camera = camera ?? false;
        }
        if (codecs) settings.video = { preferred_decoder_codecs: codecs };
        this.send(settings);
      }
      if (apiVersion < 2) void this.makeOffer();
    }

    async makeOffer() {
      const { audio, video } = this.options;
      this.pc.addTransceiver("audio", { direction: audio ? "recvonly" : "inactive" });
      this.pc.addTransceiver("video", { direction: video ? "recvonly" : "inactive" });
      const offer = await this.pc.createOffer();
      // The socket has to carry the offer before any candidate.
      this.send({ type: "offer", sdp: btoa(offer.sdp), dataChannels: this.options.channels });
      await this.pc.setLocalDescription(offer);
    }

    async describe(description) {
      try {
        await this.pc.setRemoteDescription(description);
      } catch (error) {
        return this.fail(2, `failed to set remote description: ${error.message}`);
      }
      this.described = true;
      this.say("described");
      // In reverse, like the SDK.
      for (const candidate of this.pending.splice(0).reverse()) this.candidateCame(candidate);
    }

    async answer() {
      const { rejectVideo, answerSdp, early, silent } = this.options;
      // The offer names the instance's address as well.
      const offer = this.options.deaf ? this.offer.replace(/^a=candidate:.*\r\n/gm, "") : this.offer;
      await this.describe({ type: "offer", sdp: offer });
      if (silent || this.over) return;
      for (const transceiver of rejectVideo ? this.pc.getTransceivers() : []) {
        if (transceiver.receiver.track.kind === "video") transceiver.stop();
      }
      const answer = await this.pc.createAnswer();
      if (early) {
        // Candidates before the answer are allowed.
        this.early = [];
        await this.pc.setLocalDescription(answer);
        await new Promise((resolve) => setTimeout(resolve, 300));
        for (const candidate of this.early) this.sendCandidate(candidate);
        this.early = undefined;
        this.send({ type: "answer", sdp: btoa(answer.sdp) });
        return;
      }
      this.send({ type: "answer", sdp: answerSdp ?? btoa(answer.sdp) });
      if (!answerSdp) await this.pc.setLocalDescription(answer);
    }

    candidateMade(candidate) {
      if (!candidate || candidate.candidate === "") return;
      if (this.early) this.early.push(candidate);
      else this.sendCandidate(candidate);
    }

    sendCandidate({ candidate, sdpMid, sdpMLineIndex }) {
      // An address for documentation: nothing answers there. (Ports below 1024 would not even be tried.)
      const line = this.options.deaf ? candidate.replace(/( udp \d+ )\S+ \d+ /i, "$1192.0.2.1 61999 ") : candidate;
      if (this.options.deaf && !/ udp /i.test(candidate)) return;
      this.send({ type: "candidate", candidate: this.options.badCandidates ? "%%%" : btoa(line), sdpMid, sdpMLineIndex });
    }

    candidateCame(message) {
      if (!this.described) return void this.pending.push(message);
      let line;
      try {
        line = atob(message.candidate);
      } catch (error) {
        return this.say("bad-candidate", { error: error.message });
      }
      if (this.options.deaf) line = line.replace(/( udp \d+ )\S+ \d+ /i, "$1127.0.0.1 61999 ");
      this.pc
        .addIceCandidate({ candidate: line, sdpMid: message.sdpMid, sdpMLineIndex: message.sdpMLineIndex })
        .catch((error) => this.say("bad-candidate", { line, error: error.message }));
    }

    iceChanged() {
      const state = this.pc.iceConnectionState;
      this.say(`ice:${state}`);
      clearTimeout(this.lost);
      if (state === "connected") {
        if (!this.options.keepSocket) this.socket.close();
        if (!this.options.audio && !this.options.video) this.say("ready");
      } else if (state === "failed") this.fail(9, "ICE failed");
      else if (state === "disconnected") this.lost = setTimeout(() => this.fail(10, "lost connection"), 10_000);
    }

    trackCame(track, stream) {
      this.say(`track:${track.kind}`, { stream: stream?.id });
      const element = document.createElement(track.kind);
      element.autoplay = true;
      element.muted = track.kind === "video";
      element.srcObject = stream;
      this[track.kind] = element;
      if (track.kind === "video") {
        element.addEventListener("playing", () => this.say("playing"), { once: true });
        document.body.replaceChildren(element);
        const next = () =>
          element.requestVideoFrameCallback((_now, { presentedFrames, width, height }) => {
            this.shown = { presentedFrames, width, height };
            next();
          });
        next();
      }
      const { audio, video } = this.options;
      const known = (kind, wanted) => !wanted || this.events.some((event) => event.kind === `track:${kind}`);
      if (known("audio", audio) && known("video", video) && video) void this.wait("playing", 600_000).then(() => this.say("ready"), () => {});
      else if (audio && !video) this.say("ready");
    }

    async counters() {
      const found = {};
      (await this.pc.getStats()).forEach((report) => {
        if (report.type === "inbound-rtp") found[report.kind] = { packets: report.packetsReceived, frames: report.framesDecoded };
        if (report.type === "codec" && report.mimeType.startsWith("video/")) found.codec = report.mimeType;
      });
      return found;
    }

    /** Whether the picture on show has more than one colour. */
    pictured() {
      const canvas = Object.assign(document.createElement("canvas"), { width: 160, height: 90 });
      const context = canvas.getContext("2d");
      context.drawImage(this.video, 0, 0, 160, 90);
      const { data } = context.getImageData(0, 0, 160, 90);
      let [low, high] = [255, 0];
      for (let i = 0; i < data.length; i += 4) {
        const value = Math.round((data[i] + data[i + 1] + data[i + 2]) / 3);
        [low, high] = [Math.min(low, value), Math.max(high, value)];
      }
      return high - low > 12;
    }

    control(type, data) {
      const channel = this.channels.control;
      if (channel.readyState !== "open") return false;
      channel.send(text(data === undefined ? { type } : { type, data }));
      return true;
    }

    async leave() {
      this.control("stream::disconnect", {});
      // The message has to get away before the connection ends.
      await new Promise((resolve) => setTimeout(resolve, 100));
      this.stop();
    }
  }

  window.raw = {
    start: (options) => {
      const client = new Client(options);
      clients.push(client);
      client.start();
      return clients.length - 1;
    },
    wait: (id, kind, ms, skip) => clients[id].wait(kind, ms, skip),
    events: (id) => clients[id].events,
    offer: (id) => clients[id].offer,
    answer: (id) => clients[id].pc.localDescription?.sdp,
    counters: (id) => clients[id].counters(),
    pictured: (id) => clients[id].pictured(),
    size: (id) => clients[id].shown,
    control: (id, type, data) => clients[id].control(type, data),
    closeControl: (id) => clients[id].channels.control.close(),
    leave: (id) => clients[id].leave(),
    vanish: (id) => clients[id].stop(),
    iceServersAreTaken: (servers) => {
      const pc = new RTCPeerConnection({
        iceServers: servers.map(({ urls, username, password }) => ({ urls, username, credential: password })),
      });
      pc.close();
      return true;
    },
    stopAll: () => clients.forEach((client) => client.over || client.stop()),
  };
})();
