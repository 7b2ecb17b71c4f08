"""How the demo's page looks: colours come from the page's theme, so that it reads in the light and in the dark.

Gradio writes every rule again below its own class, those of a media query only so: they reach what is within a tab.
On its way there a shorthand that names a variable is lost where a part of it is set again: set the parts.
"""

DEMO_STYLE = """
.gradio-container { --soft: color-mix(in srgb, var(--body-text-color) 64%, transparent); }
.gradio-container > .main {
  max-width: 1500px !important; margin: 0 auto !important; padding: 16px clamp(12px, 2.4vw, 32px) 36px !important;
}
footer { display: none !important; }
.gradio-container .html-container { padding: 0 !important; }
.golf-head p { color: var(--soft); margin: 6px 0 0; line-height: 1.5; text-wrap: pretty; }
.golf-head p:first-child {
  margin: 0 0 2px; font-size: 0.74rem; font-weight: 650; letter-spacing: 0.09em; text-transform: uppercase;
  color: var(--primary-600);
}
.golf-head h1 {
  margin: 0; font-size: clamp(1.35rem, 3vw, 1.65rem); font-weight: 700; line-height: 1.2; letter-spacing: -0.02em;
}
#prompt textarea { line-height: 1.5; }
#buttons button { white-space: nowrap; }
#columns { align-items: stretch; }
.golf-column, .golf-column > *, .golf-column .prose { height: 100%; }
.golf-card {
  display: flex; flex-direction: column; height: 100%; overflow: hidden; background: var(--block-background-fill);
  border-radius: 10px; border-top: 3px solid var(--mark); border-bottom: 1px solid var(--border-color-primary);
  border-left: 1px solid var(--border-color-primary); border-right: 1px solid var(--border-color-primary);
}
.golf-card header { padding: 10px 14px 9px; border-bottom: 1px solid var(--border-color-primary); }
.golf-card h2 { font-size: 1.04rem; font-weight: 650; margin: 0; overflow-wrap: anywhere; line-height: 1.3; }
.golf-card header p { margin: 1px 0 0; font-size: 0.76rem; color: var(--soft); overflow-wrap: anywhere; }
.golf-text {
  flex: 1 1 auto; margin: 0; padding: 12px 14px; min-height: 15rem; max-height: 34rem; overflow-y: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4;
  font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: 0.84rem; line-height: 1.6;
}
.golf-writing .golf-text { display: flex; flex-direction: column-reverse; }
.golf-writing .golf-text > div { margin-bottom: auto; }
.golf-prompt { color: var(--soft); }
.golf-departed { background: color-mix(in srgb, var(--mark) 15%, transparent); }
.golf-writing .golf-new::after { content: "\\2588"; color: var(--mark); animation: golf-blink 1s steps(2) infinite; }
@keyframes golf-blink { 50% { opacity: 0; } }
.golf-end {
  margin-left: 6px; padding: 0 7px; border: 1px solid var(--border-color-primary); border-radius: 9px;
  font: 0.7rem system-ui, sans-serif; color: var(--soft);
}
.golf-idle { color: var(--soft); font-style: italic; font-family: system-ui, sans-serif; }
.golf-problem {
  margin: 14px !important; padding: 10px 14px; border-left: 4px solid #dc2626; border-radius: 4px; line-height: 1.5;
  background: color-mix(in srgb, #dc2626 9%, transparent); overflow-wrap: anywhere; font-size: 0.88rem;
}
.golf-note { margin: 0 14px 10px !important; font-size: 0.76rem; line-height: 1.45; color: var(--soft); }
.golf-figures {
  display: grid; grid-template-columns: repeat(6, 1fr); gap: 1px; margin: 0;
  border-top: 1px solid var(--border-color-primary); background: var(--border-color-primary);
}
.golf-figures div { grid-column: span 2; background: var(--block-background-fill); padding: 7px 8px 8px 14px; }
.golf-figures div:nth-child(4) { grid-column: span 4; }
.golf-figures dt { font-size: 0.72rem; color: var(--soft); line-height: 1.3; white-space: nowrap; }
.golf-figures dd {
  margin: 1px 0 0; font-size: 1.02rem; font-weight: 600; font-variant-numeric: tabular-nums; white-space: nowrap;
}
.golf-pictures { display: grid; gap: 18px; }
.golf-pictures figure {
  margin: 0; border: 1px solid var(--border-color-primary); border-radius: 10px; overflow: hidden;
  background: var(--block-background-fill);
}
.golf-pictures a { display: block; background: #fff; padding: 10px; }
.golf-pictures img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.golf-pictures figcaption {
  padding: 9px 14px; border-top: 1px solid var(--border-color-primary); font-size: 0.84rem; overflow-wrap: anywhere;
  color: var(--soft);
}
@media (max-width: 640px) {
  #columns { order: 1; }
  #controls { order: 2; }
  .golf-text { min-height: 7rem; max-height: 24rem; }
}
"""
"""--mark is the colour of a column, set where its card is made."""

COLUMN_MARKS = ("#0f766e", "#2b6cb0", "#dd6b20", "#7c3aed", "#be123c", "#4d7c0f", "#0891b2", "#a16207")
