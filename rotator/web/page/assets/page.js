/* Clocks that tick, shortcuts and colours: what needs no word from the service. */
(() => {
  const said = document.querySelector('meta[name="server-now"]');
  const skew = said ? Number(said.content) - Date.now() / 1000 : 0;
  const span = (s) => {
    s = Math.max(0, Math.round(s));
    if (s < 120) return `${s} s`;
    if (s < 7200) return `${Math.floor(s / 60)} min`;
    if (s < 172800) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
    return `${Math.floor(s / 86400)} d`;
  };
  const fill = (t) => {
    const now = Date.now() / 1000 + skew;
    let text = "";
    if (t.dataset.since) text = span(now - Number(t.dataset.since));
    else if (t.dataset.until) text = `in ${span(Number(t.dataset.until) - now)}`;
    else if (t.dataset.clock) {
      const at = new Date(Number(t.dataset.clock) * 1000);
      text = at.toLocaleTimeString([], { hour12: false });
      t.title = at.toLocaleString();
    }
    if (t.textContent !== text) t.textContent = text;
  };
  const tick = () => document.querySelectorAll("time").forEach(fill);
  const follow = () => {
    const box = document.getElementById("logbox");
    if (box && !box.matches(":focus-within")) box.scrollTop = box.scrollHeight;
  };
  new MutationObserver((changes) => {
    if (changes.some((c) => c.target.nodeName !== "TIME")) tick();
    if (changes.some((c) => c.target.id === "logbox" || c.target.parentElement?.id === "logbox")) follow();
  }).observe(document.body, { childList: true, subtree: true });
  setInterval(tick, 1000);

  /* A session that is over is not connected again: without this the page would try for ever. */
  setInterval(async () => {
    if (document.getElementById("popup")?.getAttribute("aria-hidden") !== "false") return;
    try {
      if ((await fetch("/favicon.ico", { cache: "no-store" })).status === 401) location.reload();
    } catch { /* the service is away: the library tries again */ }
  }, 2000);

  window.rotatorGo = (name) => {
    const heading = document.getElementById(`h-${name}`);
    if (!heading) return;
    heading.focus({ preventScroll: true });
    document.getElementById(name).scrollIntoView({ block: "start" });
  };

  const modes = ["auto", "light", "dark"];
  const kept = () => { try { return localStorage.getItem("rotator-theme") || "auto"; } catch { return "auto"; } };
  const paint = (mode) => {
    if (!window.Quasar) return;
    Quasar.Dark.set(mode === "auto" ? "auto" : mode === "dark");
    const button = document.getElementById("theme");
    if (!button) return;
    button.textContent = { auto: "Auto", light: "Light", dark: "Dark" }[mode];
    button.setAttribute("aria-label", `Colours: ${mode === "auto" ? "as the system" : mode}`);
  };
  const nextTheme = () => {
    const mode = modes[(modes.indexOf(kept()) + 1) % modes.length];
    try { localStorage.setItem("rotator-theme", mode); } catch { /* kept for this visit only */ }
    paint(mode);
  };
  const help = () => document.getElementById("helpbox").showModal();
  const ready = setInterval(() => {
    if (!document.getElementById("theme") || !window.Quasar) return;
    clearInterval(ready);
    paint(kept());
    tick();
  }, 50);
  document.addEventListener("click", (e) => {
    if (e.target.closest("#theme")) nextTheme();
    if (e.target.closest("#help")) help();
  });

  const sections = ["engines", "memory", "swaps", "queue", "plan", "calendar", "incidents", "log"];
  document.addEventListener("keydown", (e) => {
    if (e.ctrlKey || e.altKey || e.metaKey) return;
    // A dialog that was just closed holds the focus until the next frame: only an open one takes keys.
    if (e.target.closest("input, textarea, select, dialog[open], .q-menu, .q-dialog, [contenteditable]")) return;
    if (/^[1-8]$/.test(e.key)) rotatorGo(sections[Number(e.key) - 1]);
    else if (e.key === "t") nextTheme();
    else if (e.key === "?") help();
    else return;
    e.preventDefault();
  });
})();
