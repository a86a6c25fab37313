"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { tokens, compressed, layers, heads } = data;
  const rows = layers.length * heads, rowBytes = Math.ceil(compressed / 8);
  const LEVELS = 10, LEAST = [5, 25], FEWEST = 4, EXCERPT = 160, LONG = 6000;
  const NAMES = { kept: "kept", whole: "kept as they are", quantized: "kept quantized" };
  const byId = (id) => document.getElementById(id);
  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const percent = (share, digits = 1) => `${(100 * share).toFixed(digits).replace(/\.0+$/, "")}\u00a0%`;
  const number = (count) => count.toLocaleString("en");

  // Bits: token t of a head is bit t % 8 of its byte t / 8, the lowest bit first.
  const tiers = data.tiers.map(({ name, bits }) => {
    const raw = atob(bits), bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    return { name, bytes };
  });
  const ones = Uint8Array.from({ length: 256 }, (_, byte) => {
    let count = 0;
    for (; byte; byte &= byte - 1) count++;
    return count;
  });
  const chosenTiers = () => (state.tier === "kept" ? tiers : tiers.filter((t) => t.name === state.tier));
  const keptBy = (row, of = chosenTiers()) => {
    let count = 0;
    for (const { bytes } of of) {
      for (let i = row * rowBytes, end = i + rowBytes; i < end; i++) count += ones[bytes[i]];
    }
    return count;
  };
  const keeps = (row, token, tier) => (tier.bytes[row * rowBytes + (token >> 3)] >> (token & 7)) & 1;

  // Of how many of some heads each token is kept.
  const countsOf = (some) => {
    const counts = new Uint16Array(compressed);
    for (const { bytes } of chosenTiers()) {
      for (const row of some) {
        const start = row * rowBytes;
        for (let i = 0; i < rowBytes; i++) {
          for (let byte = bytes[start + i], t = 8 * i; byte; byte >>= 1, t++) counts[t] += byte & 1;
        }
      }
    }
    return counts;
  };

  const passages = data.passages.map((start, i) => {
    const end = i + 1 < data.passages.length ? data.passages[i + 1] : tokens.length;
    return { start, end, dense: start >= compressed, spans: null, element: null, share: 0 };
  });
  const passageOf = new Uint32Array(tokens.length);
  passages.forEach(({ start, end }, i) => passageOf.fill(i, start, end));

  const state = { tier: data.tier, unit: "passages", layer: null, head: null };
  let counts, chosen, scale;
  const selected = () => {
    if (state.layer === null) return [...Array(rows).keys()];
    if (state.head !== null) return [state.layer * heads + state.head];
    return [...Array(heads).keys()].map((head) => state.layer * heads + head);
  };
  const nameOf = (layer, head) => `layer ${layers[layer]}` + (head === null ? "" : `, head ${head}`);

  // --- the text -------------------------------------------------------------------------------
  const buildText = () => {
    const text = byId("text");
    let block = make("p");
    passages.forEach((passage, index) => {
      const span = make("span", passage.dense ? "passage dense" : "passage");
      span.passage = index;
      passage.element = span;
      passage.spans = [];
      block.append(span);
      for (let t = passage.start; t < passage.end; t++) {
        const last = t + 1 === passage.end, ends = last && tokens[t].endsWith("\n");
        const token = make("span", "", ends ? tokens[t].slice(0, -1) : tokens[t]);
        token.token = t;
        passage.spans.push(token);
        span.append(token);
        if (ends) {
          text.append(block);
          block = make("p");
        }
      }
    });
    if (block.firstChild) text.append(block);
    text.classList.toggle("long", tokens.length > LONG);
  };

  const shareOf = (token) => counts[token] / chosen.length;
  const level = (share) => {
    const { low, mean, high } = scale;
    if (high - low < 1e-9) return share > 0.999 ? LEVELS : share < 0.001 ? 0 : LEVELS / 2;
    if (share >= high) return LEVELS;
    if (share <= low) return 0;
    const half = LEVELS / 2;
    return share >= mean
      ? half + Math.round((half * (share - mean)) / (high - mean))
      : half - Math.round((half * (mean - share)) / (mean - low));
  };
  const isPlain = () => state.unit === "tokens" && chosen.length === 1; // a token is kept or not
  const shadeOf = (token) => {
    if (!isPlain()) return `k${level(shareOf(token))}`;
    const tier = chosenTiers().find((one) => keeps(chosen[0], token, one));
    return !tier ? "gone" : tier.name === "quantized" ? "quantized" : "k9";
  };
  const quantile = (sorted, q) => sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))];

  const shadeText = () => {
    chosen = selected();
    counts = countsOf(chosen);
    let total = 0;
    for (const count of counts) total += count;
    const mean = total / (compressed * chosen.length), values = [];
    for (const passage of passages) {
      if (passage.dense) continue;
      let sum = 0;
      for (let t = passage.start; t < passage.end; t++) sum += counts[t];
      passage.share = sum / (chosen.length * (passage.end - passage.start));
      if (state.unit === "passages") values.push(passage.share);
    }
    if (state.unit === "tokens") for (let t = 0; t < compressed; t++) values.push(shareOf(t));
    values.sort((a, b) => a - b);
    // Sink tokens and the like would squeeze all others into two shades.
    scale = { low: Math.min(mean, quantile(values, 0.02)), mean, high: Math.max(mean, quantile(values, 0.98)) };
    for (const passage of passages) {
      if (passage.dense) continue;
      const whole = state.unit === "passages";
      passage.element.className = whole ? `passage k${level(passage.share)}` : "passage";
      for (const span of passage.spans) span.className = whole ? "" : shadeOf(span.token);
    }
    showLeast();
    showSelection();
    drawStrip();
  };

  const showSelection = () => {
    const line = byId("shaded-by");
    const mean = scale.mean, what = NAMES[state.tier];
    const who = state.layer === null ? "all heads" : nameOf(state.layer, state.head);
    line.replaceChildren(
      "Shaded by ", make("b", "", who), ` — ${percent(mean)} ${what}`,
    );
    if (state.layer !== null) {
      const all = make("button", "", "Show all heads");
      all.type = "button";
      all.id = "all-heads";
      all.addEventListener("click", () => select(null, null));
      line.append(all);
    }
    const ramp = make("span", "ramp");
    for (let k = 0; k <= LEVELS; k++) ramp.append(make("i", `k${k}`));
    const scaleOf = isPlain()
      ? [...chosenTiers().map(({ name }) => make("span", `${name === "whole" ? "k9" : name} sample`, tiers.length > 1 ? NAMES[name] : "kept")),
        make("span", "gone sample", state.tier === "kept" ? "dropped" : `not ${NAMES[state.tier]}`)]
      : [make("span", "", `least, ≤ ${percent(scale.low, 0)}`), ramp, make("span", "", `most, ≥ ${percent(scale.high, 0)}`)];
    byId("text-legend").replaceChildren(...scaleOf, make("span", "mark", "least kept passages"));
    for (const button of document.querySelectorAll(".cell, .layer")) {
      const { layer, head } = button.place;
      button.setAttribute("aria-pressed", String(layer === state.layer && head === state.head));
    }
  };

  const excerpt = ({ start, end }) => {
    const text = tokens.slice(start, end).join("").replace(/\s+/g, " ").trim();
    return text.length > EXCERPT ? text.slice(0, EXCERPT - 1) + "…" : text;
  };
  const showLeast = () => {
    const ordered = passages
      .filter((p) => !p.dense && p.end - p.start >= FEWEST && p.share < 1 && excerpt(p))
      .sort((a, b) => a.share - b.share || a.start - b.start)
      .slice(0, Math.min(LEAST[1], Math.max(LEAST[0], Math.ceil(passages.length / 8))));
    byId("least").replaceChildren(...ordered.map((passage) => {
      passage.element.classList.add("least");
      const item = make("li"), button = make("button"), words = make("span");
      button.type = "button";
      words.append(make("q", "", excerpt(passage)),
        make("small", "", `tokens ${number(passage.start)}–${number(passage.end - 1)}`));
      button.append(make("b", "", percent(passage.share)), words);
      button.addEventListener("click", () => goTo(passage));
      item.append(button);
      return item;
    }));
    if (!ordered.length) byId("least").append(make("li", "hint", "Every passage is kept whole."));
  };

  let found = null;
  const goTo = (passage) => {
    if (found) found.classList.remove("found");
    found = passage.element;
    found.classList.add("found");
    found.scrollIntoView({ block: "center" });
    found.tabIndex = -1;
    found.focus({ preventScroll: true });
  };

  // --- the strip ------------------------------------------------------------------------------
  const drawStrip = () => {
    const canvas = byId("strip"), density = window.devicePixelRatio || 1;
    canvas.width = Math.max(1, Math.round(canvas.clientWidth * density));
    canvas.height = Math.round(18 * density);
    const context = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(`--${name}`).trim();
    const perToken = canvas.width / tokens.length;
    for (const { start, end, share, dense } of passages) {
      if (dense) continue;
      const single = state.unit === "tokens";
      for (let t = start; t < end; t += single ? 1 : end - start) {
        const width = (single ? 1 : end - start) * perToken;
        context.fillStyle = color(single ? shadeOf(t).replace("quantized", "faint") : `k${level(share)}`);
        context.fillRect(t * perToken, 0, Math.max(width, 0.5), canvas.height);
      }
    }
  };

  // --- the heat map ---------------------------------------------------------------------------
  const buildMap = () => {
    const [head] = byId("map").tHead.children.length ? byId("map").tHead.children : [byId("map").tHead.insertRow()];
    head.append(make("th", "corner", "layer"));
    for (let h = 0; h < heads; h++) head.append(make("th", "", heads > 16 && h % 4 ? "" : `${heads > 6 ? "" : "head "}${h}`));
    head.append(make("th", "", "mean"));
    layers.forEach((_, layer) => {
      const row = byId("map").tBodies[0].insertRow();
      const first = make("th"), button = make("button", "layer", `${layers[layer]}`);
      first.scope = "row";
      button.type = "button";
      button.place = { layer, head: null };
      button.tabIndex = -1;
      first.append(button);
      row.append(first);
      for (let h = 0; h < heads; h++) {
        const cell = make("button", "cell");
        cell.type = "button";
        cell.place = { layer, head: h };
        cell.tabIndex = layer || h ? -1 : 0;
        row.insertCell().append(cell);
      }
      const mean = row.insertCell();
      mean.className = "mean";
      mean.append(make("i"));
    });
  };
  const buttonAt = (layer, column) => {
    const row = byId("map").tBodies[0].rows[layer];
    return row && column >= 0 && column <= heads ? row.cells[column].firstChild : null;
  };

  const shadeMap = () => {
    const shares = [...Array(rows).keys()].map((row) => keptBy(row) / compressed);
    const most = Math.max(...shares, 1e-9);
    for (const cell of document.querySelectorAll(".cell")) {
      const { layer, head } = cell.place, share = shares[layer * heads + head];
      cell.style.setProperty("--level", (share / most).toFixed(4));
      cell.classList.toggle("mid", share / most > 0.42);
      cell.classList.toggle("deep", share / most > 0.68);
      cell.textContent = heads <= 6 ? (100 * share).toFixed(0) : "";
      cell.setAttribute("aria-label", tipOfHead(layer, head).replace(/\n/g, ". "));
    }
    layers.forEach((_, layer) => {
      const own = shares.slice(layer * heads, (layer + 1) * heads);
      const mean = own.reduce((a, b) => a + b, 0) / heads;
      byId("map").tBodies[0].rows[layer].cells[heads + 1].firstChild.style.width = `${100 * mean / most}%`;
      buttonAt(layer, 0).setAttribute("aria-label", `Layer ${layers[layer]}: ${percent(mean)} ${NAMES[state.tier]}`);
    });
    byId("map-legend").replaceChildren(
      make("span", "", "0 %"), make("span", "ramp"), make("span", "", percent(most, 0)),
    );
  };

  const tipOfHead = (layer, head) => {
    const row = layer * heads + head, all = keptBy(row, tiers);
    const lines = [`Layer ${layers[layer]}, head ${head}`,
      `keeps ${number(all)} of ${number(compressed)} tokens, ${percent(all / compressed)}`];
    if (tiers.length > 1) {
      for (const tier of tiers) lines.push(`${number(keptBy(row, [tier]))} ${tier.name === "whole" ? "as they are" : tier.name}`);
    }
    return lines.join("\n");
  };
  const tipOfToken = (token) => {
    const passage = passages[passageOf[token]];
    const word = tokens[token].trim();
    const name = `Token ${number(token)}${word ? ` “${word}”` : ""}`;
    if (passage.dense) return `${name}\nfills no block: not compressed`;
    const lines = [name];
    if (chosen.length === 1) {
      const tier = tiers.find((one) => keeps(chosen[0], token, one));
      lines.push(tier ? (tier.name === "quantized" ? "kept quantized" : "kept") : "dropped");
    } else {
      lines.push(`kept by ${number(counts[token])} of ${number(chosen.length)} heads, ${percent(shareOf(token))}`);
    }
    lines.push(`its passage: ${percent(passage.share)}`);
    if (token < data.sinks) lines.push("a sink token, which every head keeps");
    else if (token >= compressed - data.recent) lines.push("a recent token, which every head keeps");
    return lines.join("\n");
  };

  const select = (layer, head) => {
    const same = layer === state.layer && head === state.head;
    state.layer = same ? null : layer;
    state.head = same ? null : head;
    shadeText();
  };

  // --- what the reader does -------------------------------------------------------------------
  const tip = byId("tip");
  const showTip = (target, text) => {
    tip.textContent = text;
    tip.hidden = false;
    const box = target.getClientRects()[0] || target.getBoundingClientRect(), own = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left), window.innerWidth - own.width - 8);
    const above = box.top - own.height - 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 4 ? above : box.bottom + 8}px`;
  };
  const hideTip = () => { tip.hidden = true; };
  const tipFor = (event) => {
    const { target } = event;
    if (target.classList.contains("cell")) showTip(target, tipOfHead(target.place.layer, target.place.head));
    else if (target.classList.contains("layer")) showTip(target, target.getAttribute("aria-label"));
    else if (target.token !== undefined) showTip(target, tipOfToken(target.token));
    else hideTip();
  };
  document.addEventListener("pointerover", tipFor);
  document.addEventListener("focusin", tipFor);
  document.addEventListener("focusout", hideTip);
  document.addEventListener("scroll", hideTip, true);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      if (!tip.hidden) hideTip();
      if (state.layer !== null) select(null, null);
    }
  });
  byId("map").addEventListener("click", (event) => {
    const { place } = event.target;
    if (place) select(place.layer, place.head);
  });
  byId("map").addEventListener("keydown", (event) => {
    const { place } = event.target;
    if (!place) return;
    const column = place.head === null ? 0 : place.head + 1;
    const moves = {
      ArrowUp: [place.layer - 1, column], ArrowDown: [place.layer + 1, column],
      ArrowLeft: [place.layer, column - 1], ArrowRight: [place.layer, column + 1],
      Home: [place.layer, 1], End: [place.layer, heads],
      PageUp: [0, column], PageDown: [layers.length - 1, column],
    };
    const next = moves[event.key] && buttonAt(...moves[event.key]);
    if (!moves[event.key]) return;
    event.preventDefault();
    if (!next) return;
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  byId("strip").addEventListener("click", (event) => {
    const token = Math.floor((event.offsetX / event.target.clientWidth) * tokens.length);
    goTo(passages[passageOf[Math.min(tokens.length - 1, Math.max(0, token))]]);
  });
  window.addEventListener("resize", drawStrip);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawStrip);

  const buildChoice = (id, options, onChange) => {
    options.forEach(([value, words], i) => {
      const label = make("label"), input = make("input");
      input.type = "radio";
      input.name = id;
      input.value = value;
      input.checked = value === data.tier || (id === "unit-choice" && i === 0);
      input.addEventListener("change", () => onChange(value));
      label.append(input, make("span", "", words));
      byId(id).append(label);
    });
  };
  buildChoice("unit-choice", [["passages", "Passages"], ["tokens", "Tokens"]], (unit) => {
    state.unit = unit;
    shadeText();
  });
  if (tiers.length > 1) {
    buildChoice("tier-choice", [["kept", "Kept"], ["whole", "As they are"], ["quantized", "Quantized"]], (tier) => {
      state.tier = tier;
      shadeMap();
      shadeText();
    });
    byId("tier-choice").hidden = false;
  }
  buildMap();
  buildText();
  shadeMap();
  shadeText();
})();
