{#- The lower end of the 95% Wilson interval of hits / trials: a rate that small numbers cannot inflate. -#}
{%- macro wilson_lower_bound(hits, trials) -%}
    {%- set z = 1.96 -%}
    (
        {{ hits }} + {{ z * z / 2 }}
        - {{ z }} * sqrt({{ hits }} * ({{ trials }} - {{ hits }}) / {{ trials }} + {{ z * z / 4 }})
    ) / ({{ trials }} + {{ z * z }})
{%- endmacro -%}
