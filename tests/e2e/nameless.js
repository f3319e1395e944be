// What can be used or shows something, and has no name to say it by.
() => [...document.querySelectorAll("a, button, input, [role=img], svg:not([aria-hidden])")]
  .filter((one) => one.getClientRects().length && !one.closest("[aria-hidden=true]"))
  .filter((one) => !(one.getAttribute("aria-label") || one.closest("label") || one.textContent.trim()))
  .map((one) => one.outerHTML.slice(0, 80))
