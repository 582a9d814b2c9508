// What Gradio has no component for: the dials, the token under the pointer, the state of the server, files.
window.ipissa = (() => {
  const escape = (text) =>
    String(text).replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);
  const signed = (alpha) => (alpha > 0 ? "+" : "") + (Math.round(alpha * 1000) / 1000).toString().replace("-", "−");

  // --- dials ---------------------------------------------------------------------------------
  // The thumb's middle runs from half its width to the track's width less that.
  const along = (dial, alpha) => {
    const share = dial.high > dial.low ? (alpha - dial.low) / (dial.high - dial.low) : 0;
    return `calc(var(--thumb) / 2 + (100% - var(--thumb)) * ${Math.max(0, Math.min(1, share)).toFixed(4)})`;
  };

  const drawMark = (dial, alpha) =>
    `<span style="left:${along(dial, alpha)}"${alpha === 0 ? ' class="zero"' : ""}>${alpha === 0 ? "0" : signed(alpha)}</span>`;

  function drawDial(dial, alpha, held) {
    const name = escape(dial.name);
    const marks = [...new Set([dial.low, -1, 0, 1, dial.high])].filter((at) => at >= dial.low && at <= dial.high);
    const beyond = alpha < dial.low || alpha > dial.high;
    const words = alpha === 0 ? "0, the base model" : `${signed(alpha)}, towards ${alpha > 0 ? dial.positive : dial.negative}`;
    const fill = [along(dial, Math.min(0, alpha)), along(dial, Math.max(0, alpha))];
    return `<div class="dial${held ? " held" : ""}" data-name="${name}">
      <div class="dial-name"><strong>α of ${name}</strong></div>
      <div class="dial-track" style="--from:${fill[0]};--to:${fill[1]}">
        <input type="range" min="${dial.low}" max="${dial.high}" step="${dial.step}" value="${alpha}"
          aria-label="α of ${name}" aria-valuetext="${escape(words)}">
        <div class="marks" aria-hidden="true">${marks.map((at) => drawMark(dial, at)).join("")}</div>
        <div class="poles"><span>${escape(dial.negative)}</span><span>${escape(dial.positive)}</span></div>
      </div>
      <div class="dial-typed">
        <input type="number" min="${-dial.limit}" max="${dial.limit}" step="${dial.step}" value="${alpha}"
          aria-label="α of ${name}, typed">
        <button type="button" aria-label="Set ${name} to 0" title="Set to 0">0</button>
      </div>
      <div class="beyond" role="status">${beyond ? `Beyond the calibrated range (${signed(dial.low)} to ${signed(dial.high)}): text may fall apart.` : ""}</div>
    </div>`;
  }

  const drawDials = (value) =>
    (value?.dials ?? []).map((dial) => drawDial(dial, value.alphas[dial.name], value.held === dial.name)).join("");

  let moves = 0; // tells the server which of two positions is the newer one
  function listen(element, props, trigger) {
    const nameOf = (target) => target.closest(".dial").dataset.name;
    const set = (name, typed) => {
      const dial = props.value.dials.find((each) => each.name === name);
      const whole = Math.round(Math.max(-dial.limit, Math.min(dial.limit, typed)) * 1000) / 1000;
      const alpha = Math.abs(whole) < 1e-9 ? 0 : whole; // -0 and what rounding leaves of 0 are 0
      props.value = { ...props.value, alphas: { ...props.value.alphas, [name]: alpha }, held: name, moved: ++moves };
      trigger("input");
    };
    element.addEventListener("input", (event) => {
      if (event.target.type === "range") set(nameOf(event.target), event.target.valueAsNumber);
    });
    element.addEventListener("change", (event) => {
      if (event.target.type === "number") {
        const typed = event.target.valueAsNumber;
        const name = nameOf(event.target);
        if (Number.isFinite(typed)) set(name, typed);
        event.target.value = props.value.alphas[name];
      }
      trigger("release");
    });
    element.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      set(nameOf(button), 0);
      trigger("release");
    });
  }

  // Of Gradio's own sliders only a pointer tells that it has let go; the arrow keys shall, too.
  document.addEventListener("keyup", (event) => {
    const slider = event.target.closest?.('[data-testid="range-input"]');
    if (slider) slider.dispatchEvent(new PointerEvent("pointerup", { bubbles: true }));
  });

  // --- the token under the pointer, or reached with the arrow keys --------------------------------
  function show(token) {
    document.querySelectorAll(".token.active").forEach((each) => each.classList.remove("active"));
    token.classList.add("active");
    const line = token.closest("[data-tokens]")?.parentElement.querySelector(".token-tip");
    if (line) line.textContent = token.dataset.tip;
  }
  document.addEventListener("pointerover", (event) => {
    const token = event.target.closest?.(".token[data-tip]");
    if (token) show(token);
  });
  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return; // the browser's own keys
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const text = event.target.closest?.(".tokens");
    if (!step || !text) return;
    const tokens = [...text.querySelectorAll(".token[data-tip]")];
    const at = tokens.findIndex((each) => each.classList.contains("active"));
    const next = tokens[Math.max(0, Math.min(tokens.length - 1, at < 0 ? 0 : at + step))];
    if (next) show(next);
    event.preventDefault();
  });

  // --- the state of the server ----------------------------------------------------------------
  const GONE = "The server is gone. Your settings are kept; this page goes on by itself when it is back.";
  const SAYS = {
    loading: "The server is loading its model. This page goes on by itself when it is ready.",
    gone: GONE,
    unreached: GONE,
    slow: "The server is slow to answer just now.",
    failed: "This page could not open, although the server is ready. It tries again by itself.",
  };
  const STATES = { 200: "ready", 503: "loading", 504: "slow" };
  let said = ""; // by a server whose engine has ended: what to do about it
  const MISSES = "ipissa-misses"; // how often in a row this tab failed to open
  let wasMissing = false; // the server said so itself, or it is another one now
  let wasUnreached = false;
  let notBefore = 0;
  async function health() {
    try {
      const answer = await fetch("health", { cache: "no-store", signal: AbortSignal.timeout(5000) });
      const { error } = answer.status === 503 ? await answer.json().catch(() => ({})) : {};
      if (error?.code !== "engine_dead") return STATES[answer.status] ?? "gone";
      said = error.message;
      return "ended";
    } catch (error) {
      return error.name === "TimeoutError" ? "slow" : "unreached";
    }
  }
  // Where only the network was away, the server still knows this page, with all that no address restores.
  async function knowsThisPage() {
    try {
      const answer = await fetch("gradio_api/app_id", { cache: "no-store", signal: AbortSignal.timeout(5000) });
      return (await answer.json()).app_id === window.gradio_config.app_id;
    } catch {
      return false;
    }
  }
  async function watch() {
    const state = await health();
    if (state === "unreached") wasUnreached = true;
    else if (state === "ready" && wasUnreached) {
      wasMissing ||= !(await knowsThisPage());
      wasUnreached = false;
    }
    const waits = state === "ready" && wasMissing && Date.now() < notBefore;
    if (state === "ready" && wasMissing && !waits) return location.reload(); // the address restores the settings
    // A slow server still knows this page; loading it again would only give the server more to do.
    if (!["slow", "unreached"].includes(state) && !waits) wasMissing = state !== "ready";
    let banner = document.getElementById("server-state");
    if (!banner) {
      banner = document.createElement("div");
      banner.id = "server-state";
      banner.setAttribute("role", "alert");
      document.body.append(banner);
    }
    banner.hidden = state === "ready" && !waits;
    banner.textContent = waits ? SAYS.failed : state === "ended" ? said : (SAYS[state] ?? "");
    setTimeout(watch, state === "ready" ? 3000 : 1000);
  }
  // Gradio may add this script before the page is read or after.
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", watch);
  else watch();
  // What failed once may fail again, so that every further attempt waits longer.
  function missed() {
    const misses = Number(sessionStorage.getItem(MISSES)) + 1;
    sessionStorage.setItem(MISSES, misses);
    notBefore = Date.now() + 1000 * Math.min(60, 2 ** misses);
    wasMissing = true; // by the time of the next look the server may be back
  }
  function found() {
    sessionStorage.removeItem(MISSES);
    wasMissing = false;
  }

  // --- links, keys and files --------------------------------------------------------------------
  function remember(query) {
    const parameters = new URLSearchParams(location.search); // the theme may be among them
    for (const [name, value] of new URLSearchParams(query)) parameters.set(name, value);
    const link = `${location.origin}${location.pathname}?${parameters}`;
    try {
      if (query && link !== location.href) history.replaceState(history.state, "", link);
    } catch {
      // Some browsers take only so many addresses in a while; the next one holds everything, too.
    }
    return link;
  }
  // Browsers have no clipboard for a page that came over plain http from another machine.
  function copy(link) {
    if (navigator.clipboard) return void navigator.clipboard.writeText(link);
    const box = Object.assign(document.createElement("textarea"), { value: link });
    document.body.append(box);
    box.select();
    document.execCommand("copy");
    box.remove();
  }
  function save(file) {
    if (!file) return;
    const anchor = Object.assign(document.createElement("a"), { href: file.data, download: file.name });
    document.body.append(anchor);
    anchor.click();
    anchor.remove();
  }
  const KEY = "ipissa-api-key"; // of this tab only; never in a link
  const opened = (key) => [key || sessionStorage.getItem(KEY) || "", location.href];
  const keepKey = (key) => sessionStorage.setItem(KEY, key ?? "");

  return { drawDials, listen, missed, found, remember, copy, save, opened, keepKey };
})();
