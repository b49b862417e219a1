// The contrast of every visible text of the page with what is behind it (WCAG 2.2): [texts seen, those below 4.5].

const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });

function rgba(colour) {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
}

function over(top, below) {
  const share = top[3] / 255;
  return [0, 1, 2].map((channel) => top[channel] * share + below[channel] * (1 - share));
}

function behind(node) {
  if (!node) return [255, 255, 255];
  const own = rgba(getComputedStyle(node).backgroundColor);
  return own[3] === 255 ? own : over(own, behind(node.parentElement));
}

function luminance(colour) {
  const linear = colour
    .slice(0, 3)
    .map((value) => value / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
}

function ratio(a, b) {
  const [bright, dim] = [luminance(a), luminance(b)].sort((x, y) => y - x);
  return (bright + 0.05) / (dim + 0.05);
}

const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT),
  poor = [];
let seen = 0;
while (walker.nextNode()) {
  const text = walker.currentNode.data.trim(),
    node = walker.currentNode.parentElement;
  const visible = node.checkVisibility({ visibilityProperty: true, opacityProperty: true });
  if (!text || !visible || node.matches(":disabled") || node.closest(".aside")) continue;
  seen += 1;
  const paper = behind(node),
    found = ratio(over(rgba(getComputedStyle(node).color), paper), paper);
  if (found < 4.5) poor.push(`${node.className || node.tagName} ${found.toFixed(2)} ${text.slice(0, 20)}`);
}
return [seen, poor];
