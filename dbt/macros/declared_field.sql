{# A field that the fraud rules declare, out of an order's attributes: null where it has none, or one of another kind. #}
{% macro declared_field(name, kind) -%}
    {%- set text = "json_value(attributes, '$." ~ name ~ "')" -%}
    {%- set types = {'int': 'int64', 'number': 'float64', 'bool': 'bool'} -%}
    {{ text if kind == 'string' else 'safe_cast(' ~ text ~ ' as ' ~ types[kind] ~ ')' }}
{%- endmacro %}
