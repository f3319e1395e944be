// Visible text whose contrast is below 4.5 (WCAG 2.2, 1.4.3). Colours are painted to
// learn their channels, whatever notation they are written in.
() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const channels = (colour, under) => {
    for (const one of [under, colour]) {
      canvas.fillStyle = one;
      canvas.fillRect(0, 0, 1, 1);
    }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb
      .map((channel) => channel / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor;
      if (!/, 0\)$|^transparent$/.test(colour)) return colour;
    }
    return "#fff";
  };
  const poor = new Set();
  for (const one of document.querySelectorAll("body *")) {
    const hasText = [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!hasText || !one.getClientRects().length || one.closest("svg, noscript, .unseen")) continue;
    const under = ground(one);
    const text = luminance(channels(getComputedStyle(one).color, under));
    const back = luminance(channels(under, under));
    const ratio = (Math.max(text, back) + 0.05) / (Math.min(text, back) + 0.05);
    if (ratio < 4.5) poor.add(`${one.className || one.tagName} ${one.textContent.slice(0, 20)} ${ratio.toFixed(2)}`);
  }
  return [...poor];
}
