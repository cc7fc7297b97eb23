"use strict";
// Keys between samples, values under the pointer, and the reload of a run that is going on.
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const root = document.documentElement, samples = all(".sample");

function step(by) {
  let current = samples.indexOf(document.activeElement.closest(".sample"));
  if (current < 0) {
    const seen = (each) => each.offsetParent && each.getBoundingClientRect().top <= root.clientHeight / 3;
    current = samples.findLastIndex(seen);
  }
  const next = samples[Math.min(samples.length - 1, Math.max(0, current + by))];
  const folded = next.closest("details");
  if (folded) folded.open = true;
  next.scrollIntoView();
  next.focus({ preventScroll: true });
}
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !samples.length) return;
  const inside = event.target.closest(".sample") && !event.target.closest("pre, .scroll");
  const by = { j: 1, k: -1, ArrowRight: inside && 1, ArrowLeft: inside && -1 }[event.key];
  if (by) { event.preventDefault(); step(by); }
});

for (const figure of all("figure")) {
  const svg = figure.querySelector("svg.chart"), rows = all("tbody tr", figure);
  if (!svg.dataset.low || !rows.length) continue;
  const [low, high, left, right] = ["low", "high", "left", "right"].map((key) => +svg.dataset[key]);
  const steps = rows.map((row) => +row.cells[0].textContent);
  const cursor = svg.querySelector(".cursor"), at = figure.querySelector(".at");
  const values = all(".legend b", figure), usual = values.map((each) => each.textContent);
  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const wanted = low + (x - left) / (right - left) * (high - low);
    const distance = (i) => Math.abs(steps[i] - wanted);
    const nearest = steps.reduce((best, _, i) => distance(i) < distance(best) ? i : best, 0);
    const place = left + (steps[nearest] - low) / (high - low) * (right - left);
    cursor.setAttribute("x1", place);
    cursor.setAttribute("x2", place);
    cursor.setAttribute("visibility", "visible");
    at.textContent = "at step " + steps[nearest];
    values.forEach((each, i) => { each.textContent = rows[nearest].cells[i + 1].textContent || "–"; });
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden");
    at.textContent = "";
    values.forEach((each, i) => { each.textContent = usual[i]; });
  });
}

if (root.dataset.state === "running") {
  const written = document.querySelector("time"), age = document.getElementById("age");
  const silent = document.getElementById("silent"), key = "minidistill:" + location.pathname;
  const pause = +root.dataset.pause, details = all("details");
  try {
    const kept = JSON.parse(sessionStorage.getItem(key));
    if (kept && performance.getEntriesByType("navigation")[0]?.type === "reload") {
      history.scrollRestoration = "manual";
      details.forEach((each, i) => { each.open = kept.open[i] ?? each.open; });
      const focused = kept.focus && document.getElementById(kept.focus);
      if (focused) focused.focus({ preventScroll: true });
      scrollTo({ top: kept.top, behavior: "instant" });
    }
  } catch { /* a browser that keeps nothing */ }
  addEventListener("pagehide", () => {
    const state = { top: scrollY, open: details.map((each) => each.open), focus: document.activeElement.id };
    try { sessionStorage.setItem(key, JSON.stringify(state)); } catch { /* as above */ }
  });
  const loaded = Date.now();
  const tick = () => {
    const seconds = Math.max(0, Math.round((Date.now() - Date.parse(written.dateTime)) / 1000));
    age.textContent = "· written " + (seconds < 120 ? `${seconds} s` : `${Math.round(seconds / 60)} min`) + " ago";
    silent.hidden = seconds < Math.max(120, 5 * pause);
    const reading = !getSelection().isCollapsed || document.hidden;
    if (!reading && Date.now() - loaded > 1000 * Math.min(60, pause)) location.reload();
  };
  tick();
  setInterval(tick, 1000);
}
