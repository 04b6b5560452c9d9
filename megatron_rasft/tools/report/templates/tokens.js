"use strict";

// Colours the tokens of a rollout when they are opened. search.js unpacks them.
for (const details of document.querySelectorAll("details.tokens")) {
  details.addEventListener("toggle", async () => {
    const largest = Number(details.dataset.largest);
    const tokens = JSON.parse(await unpacked(details.querySelector("script").textContent.trim()));
    const isTrained = tokens.some(([, , weight]) => weight);
    details.querySelector("pre").replaceChildren(...tokens.map(([text, p, weight]) => {
      const share = isTrained ? Math.abs(weight) / largest : p;
      const colour = isTrained ? (weight < 0 ? "--bad-token" : "--good-token") : "--base";
      const token = element("span", { textContent: text, title: `p ${p.toPrecision(3)}` + (isTrained ? `, ${details.dataset.formula} ${weight.toPrecision(3)}` : "") });
      token.style.background = `color-mix(in srgb, var(${colour}) ${(isTrained ? 70 : 40) * share}%, transparent)`;
      return token;
    }));
  }, { once: true });
}
